/** Keeps every file of the page, so that it opens without a network. The build fills in version and files. */

const PREFIX = `explorer ${registration.scope} `; // other pages of the same host have caches of their own
const CACHE = PREFIX + "{{version}}";
const FILES = JSON.parse(`{{files}}`);
const upToDate = (file) => new Request(file, { cache: "no-cache" }); // never a mixture of two versions

addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES.map(upToDate)))
      .then(() => skipWaiting()),
  );
});

addEventListener("activate", (event) => {
  const deleteOld = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== CACHE);
    await Promise.all(old.map((name) => caches.delete(name)));
    await clients.claim();
  };
  event.waitUntil(deleteOld());
});

addEventListener("fetch", (event) => {
  const cached = caches.open(CACHE).then((cache) => cache.match(event.request));
  event.respondWith(cached.then((response) => response ?? fetch(event.request)));
});
