"""The benchmark counts what it should, times another implementation beside ours, and refuses bad input."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from common import command, norm, resample, training
from common.command import UserError, run_command
from common.flops import flop_counter
from common.runs import ROOT
from common.turns import wait
from lesson_01_ddpm import unet
from lesson_01_ddpm.unet import attend
from lesson_06_miniglide import benchmark, contenders, rounding, savings
from lesson_06_miniglide.contenders import Contender
from lesson_06_miniglide.data_speed import data_rates
from lesson_06_miniglide.growth import Alive, TrainingMemory, cost, counted_peak, network_for
from lesson_06_miniglide.roofline import Accounts, kind_of

ADAPTER = """
from torch import nn

def new_network(image_shape):
    return nn.Conv2d(image_shape[0], 5, 3, padding=1)

def call(network, x_t, t):
    return network(x_t)
"""


def run(*flags):
    run_command(benchmark.main, benchmark.Config, argv=[*flags, "--device", "cpu"])


def test_a_table_with_another_implementation_beside_ours(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(ADAPTER)
    out = tmp_path / "speed.json"
    few = ["--batch-size", "2", "--rounds", "1"]
    run("lesson_03", "--against", str(tmp_path / "mine.py"), *few, "--out", str(out))
    content = json.loads(out.read_text())
    rows = {(row["network"], row["work"]): row for row in content["rows"]}
    assert set(rows) == {(name, work) for name in ("lesson_03", "mine") for work in ("training", "sampling")}
    conv = 2 * 5 * 9 * 32 * 32 / 1e9  # a product and a sum for each weight and place
    assert rows["mine", "sampling"]["gflop_an_image"] == pytest.approx(conv)
    assert rows["mine", "training"]["gflop_an_image"] == pytest.approx(
        2 * conv
    )  # asks how the weights matter
    assert rows["mine", "sampling"]["parameters"] == 5 * 9 + 5
    for row in rows.values():
        assert row["images_a_second"] == pytest.approx(2 / row["seconds"]) and row["of_ceiling"] > 0
    assert content["at_best"]["float32"] > 0 and "against" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lesson_03", "lesson_05"])
@pytest.mark.parametrize("library", ["diffusers", "denoising_diffusion"])
def test_other_people_s_networks_cost_as_many_flops_as_ours(name, library):
    pytest.importorskip(library.replace("denoising_diffusion", "denoising_diffusion_pytorch"))
    text = "_text" if (name, library) == ("lesson_05", "diffusers") else ""
    theirs = str(ROOT / "lesson_06_miniglide" / f"against_{library}{text}.py")
    config = benchmark.Config((name,), (theirs,), batch_size=1, fp32=True, device="cpu")
    for work in ("training", "sampling"):
        ours = benchmark.flops_an_image(name, work, config)
        flops = benchmark.flops_an_image(theirs, work, config)
        assert flops == pytest.approx(ours, rel=0.1)


def test_losses_in_bf16_are_those_in_fp32(monkeypatch, tmp_path):
    for module in (command, benchmark):
        monkeypatch.setattr(module, "is_fast_at_bf16", lambda device: True)  # slow is good enough here
    monkeypatch.setattr(rounding, "STEPS", 12)
    out = tmp_path / "rounding.json"
    run("lesson_01", "--rounding", "--batch-size", "2", "--out", str(out))
    [row] = json.loads(out.read_text())["rows"]
    assert row["last_loss_fp32"] < row["first_loss"] and 0 < row["furthest_apart"] < 0.02
    monkeypatch.setattr(rounding, "losses", lambda name, config: [1.0, 0.5] if config.fp32 else [1.0, 0.6])
    run("lesson_01", "--rounding", "--out", str(out))
    assert json.loads(out.read_text())["rows"][0]["furthest_apart"] == pytest.approx(0.2)


def test_operations_are_counted_by_kind():
    a, x = torch.randn(64, 64), torch.randn(1000)
    with Accounts(torch.device("cpu")) as accounts:
        a @ a
        x.view(10, 100) + 1.0  # reads and writes; to look at it otherwise costs nothing
        torch.nn.functional.group_norm(a[None], 4)
    product, sum_, norm = (accounts.of[kind] for kind in ("products", "all else, point by point", "norms"))
    assert (product.calls, product.flops, product.bytes) == (1, 2 * 64**3, 3 * 64**2 * 4)
    assert (sum_.calls, sum_.flops, sum_.bytes) == (1, 0, 2 * 1000 * 4)
    assert norm.calls == 1 and norm.seconds > 0 and len(accounts.of) == 3
    assert kind_of("aten._foreach_norm") == kind_of("aten._fused_adamw_") == "optimizer, average"


def test_fused_attention_is_counted():
    shape, n = (2, 3, 300, 16), 2 * 3 * 300 * 300 * 16  # a product and a sum for each
    q, k, v = torch.randn(3, *shape).requires_grad_()
    with flop_counter() as counter:
        answer = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * n  # scores, and values by them
    with flop_counter() as counter:
        answer.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * n  # the scores once more, and four gradients


def test_a_step_has_the_flops_that_the_benchmark_counts(tmp_path):
    few = ["--batch-size", "2", "--rounds", "1"]
    run("lesson_03", "--roofline", "--fp32", *few, "--out", str(tmp_path / "roofline.json"))
    run("lesson_03", "--fp32", *few, "--out", str(tmp_path / "speed.json"))
    contents = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("roofline", "speed"))
    watched, timed = (content["rows"] for content in contents)
    *kinds, whole = watched
    assert whole["gflop"] == pytest.approx(2 * timed[0]["gflop_an_image"], rel=1e-6)
    assert sum(row["of_the_step"] for row in kinds) == pytest.approx(1)
    assert kinds[0]["seconds"] == max(row["seconds"] for row in kinds)
    assert whole["least_seconds"] == pytest.approx(sum(row["least_seconds"] for row in kinds))
    names = {row["kind"]: row["flop_a_byte"] for row in kinds}
    assert names["convolutions"] > 10 and names["norms"] == 0


def test_loading_is_timed_and_set_against_a_training_step(tmp_path):
    for i in range(6):
        Image.new("RGB", (80, 60), (40 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text("a colour")
    flags = ["--data-dir", str(tmp_path), "--batch-size", "2", "--rounds", "1"]
    run("tiny", *flags, "--out", str(tmp_path / "speed.json"))
    content = json.loads((tmp_path / "speed.json").read_text())
    training, sampling = content["rows"]
    loading = 2 / content["images_a_second"]["cache"]
    assert training["waits_for_data"] == pytest.approx(loading / (loading + training["seconds"]))
    assert "waits_for_data" not in sampling and content["images_a_second"]["decoded on access"] > 0
    assert not (tmp_path / ".cache").exists()


def test_photos_that_the_cache_leaves_out_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("lesson_06_miniglide.cache.TOLERATED", 0.5)
    for i in range(4):
        Image.new("RGB", (80, 60)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text("black")
    (tmp_path / "0.jpg").write_bytes(b"no photo")
    assert set(data_rates(str(tmp_path), False, 2)) == {"cache, built", "cache", "decoded on access"}
    with pytest.raises(UserError, match="has 3 images; it takes more"):
        data_rates(str(tmp_path), False, 3)


LARGE = """
from torch import nn, zeros

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(zeros(20_000_000))

    def forward(self, x_t):
        h = self.weight[:1].expand(20_000_000)
        for _ in range(5):
            h = h.sigmoid()
        return x_t + h.mean()

def new_network(image_shape):
    return Large()

def call(network, x_t, t):
    return network(x_t)
"""


@pytest.mark.skipif(not benchmark.STATUS.exists(), reason="only Linux says it")
def test_peak_memory_is_that_of_a_step_in_the_middle_of_training(tmp_path):
    """Weights, average, moments, five tensors kept for the way back, two on it: 20 million numbers each.

    The gaps between them differ from process to process, so the least of three.
    """
    (path := tmp_path / "large.py").write_text(LARGE)
    config = benchmark.Config(networks=("lesson_01",), against=(str(path),), batch_size=1, device="cpu")
    least = min(benchmark.peak_bytes(str(path), "training", config) for _ in range(3))
    numbers = least / 4 / 20e6
    assert 4 + 5 + 2 <= numbers < 16


@pytest.fixture
def every_kind_of_attention():
    """Undone for the rest of the process otherwise."""
    savings.step_without.cache_clear()
    yield
    for enable in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)


@pytest.mark.parametrize("undone", [tuple(savings.UNDO), (savings.PLAIN,)], ids=["one by one", "all"])
def test_each_change_is_undone(undone, monkeypatch, every_kind_of_attention):
    read, kept, x = [], [], torch.zeros(3, 1, 8, 8)
    who = Contender(None, (1, 8, 8), lambda x_t, t, *text: text, lambda n: read.append(n) or ("text",))

    def probe(who, config):
        training.keep_freed_memory()  # as a trainer does
        return who, config

    monkeypatch.setattr(savings, "contender", lambda name, config: who)
    monkeypatch.setitem(savings.WORK, "probe", probe)
    monkeypatch.setattr(resample, "is_slow", lambda x: True)
    is_slow, fits_in_one = norm.is_slow, norm.fits_in_one
    monkeypatch.setattr(norm, "is_slow", is_slow)  # put back what is undone here
    monkeypatch.setattr(norm, "fits_in_one", fits_in_one)
    monkeypatch.setattr(unet, "suits_one_kernel", unet.suits_one_kernel)
    monkeypatch.setattr(contenders, "SAMPLING_FORMAT", torch.channels_last)
    for module in (savings, training):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: kept.append("kept"))

    def without(change):
        return savings.step_without(change, "probe", "lesson_05", benchmark.Config(device="cpu"))

    def calls_of_attention():
        with Accounts(torch.device("cpu")) as accounts:
            attend(*torch.randn(3, 1, 1, 1024, 32))
        return accounts.of["attention"].calls

    whole, config = without("-")
    assert whole.call(x, 0) == () and not config.fp32 and kept and calls_of_attention() == 1
    assert without("bf16")[1].fp32
    assert without("text read once a prompt")[0].call(x, 0) == ("text",) and read == [3]
    kept.clear()
    for change in undone:
        slow, config = without(change)
        assert slow.call(x, 0) == () and config.fp32 == (change == savings.PLAIN)
    assert len(kept) == len(undone) - 1  # where memory is not what is undone
    last = torch.randn(1, 32, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert is_slow(last, 4) and not norm.is_slow(last, 4)
    assert unet.suits_one_kernel(torch.zeros(1, 1024, 8, dtype=torch.bfloat16))
    assert not resample.is_slow(x) and fits_in_one(x) and not norm.fits_in_one(x)
    assert calls_of_attention() == 3  # two products and a softmax
    assert contenders.SAMPLING_FORMAT is torch.contiguous_format


def test_savings_are_set_against_the_step_with_all_changes(monkeypatch):
    def seconds(steps, rounds, device):
        return {change: [1, 2, 4] if change == "-" else [2, 2, 5] for change in steps}

    monkeypatch.setattr(savings, "take_turns", seconds)
    rows = savings.savings(benchmark.Config(networks=("lesson_05",), device="cpu"))
    whole, *others = [row for row in rows if row["work"] == "sampling"]
    assert whole["without"] == "-" and (whole["seconds"], whole["slower"]) == (2, 0)
    assert "text read once a prompt" in [row["without"] for row in others]
    for row in others:  # by 100, 0 and 25 %
        assert [row[key] for key in ("slower_from", "slower", "slower_to")] == [0.125, 0.25, 0.625]


def test_each_change_has_a_process_of_its_own():
    config = benchmark.Config(batch_size=1, rounds=1, device="cpu")
    rows = {row["without"]: row for row in savings.savings_of("lesson_01", "sampling", config)}
    assert set(rows) == {"-", *savings.changes("lesson_01", "sampling", config)} and len(rows) > 2
    assert all(row["seconds"] > 0 for row in rows.values())


def test_changes_that_make_no_difference_are_not_timed(monkeypatch):
    monkeypatch.setattr(savings, "is_fast_at_bf16", lambda device: True)
    monkeypatch.setattr(unet, "cpu_has", lambda instructions: False)
    config = benchmark.Config(device="cpu")

    def names(name, work, config=config):
        return set(savings.changes(name, work, config))

    memory, attention, halving, channels, turned, scales, plain = savings.UNDO
    bf16, text, every = savings.BF16, savings.TEXT, savings.PLAIN
    assert names("lesson_01", "training") == {memory, halving, bf16, every}
    assert names("lesson_01", "sampling") == {memory, channels, turned, bf16, every}
    assert names("lesson_05", "sampling") == {memory, channels, turned, bf16, text, every}
    assert names("report", "sampling") == {memory, plain, channels, turned, bf16, text, every}
    assert names("report", "training", replace(config, fp32=True)) == {memory, attention, scales, every}
    monkeypatch.setattr(unet, "cpu_has", lambda instructions: True)
    assert names("report", "training") == {memory, plain, halving, scales, bf16, every}
    assert names("report", "sampling") == {memory, attention, channels, turned, bf16, text, every}


def test_other_devices_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cpu", "cuda", "mps"):
        wait(torch.device(name))
    assert [device.type for device in waited] == ["cuda", "mps"]


def test_what_takes_turns_is_called_equally_often_and_the_first_time_does_not_count():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = benchmark.take_turns(steps, 3, torch.device("cpu"))
    assert called == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    "text, flags, said",
    [
        ("", [], "no `new_network`"),
        ("def new_network(:", [], "cannot be used"),
        (None, [], "cannot be used"),
        (ADAPTER, ["--rounds", "0"], "--rounds is 0"),
        (ADAPTER, ["--batch-size", "8", "0"], "--batch-size is 0"),
        (ADAPTER, ["--growth"], "--growth is of our own networks alone"),
        (ADAPTER, ["--growth", "--savings"], "--growth and --savings are different measurements"),
        (ADAPTER, ["--out", "mine.py/speed.json"], "--out mine.py cannot be made"),
        (ADAPTER, ["--data-dir", "nowhere"], "--data-dir nowhere"),
    ],
)
def test_bad_input_is_one_line(text, flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as caught:
        run("lesson_01", "--against", str(tmp_path / "mine.py"), *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    "network, flags, said",
    [
        ("lesson_7", [], "network lesson_7 is unknown"),
        ("lesson_01", ["--roofline", "--compile"], "--compile fuses"),
        ("lesson_01", ["--rounding", "--fp32"], "--rounding needs"),
        ("lesson_01", ["--cuda-graph"], "--cuda-graph needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(network, flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run(network, *flags)
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_cost():
    return cost("tiny")


def test_counted_flops_are_those_of_a_real_call(tiny_cost):
    config = benchmark.Config(networks=("tiny",), batch_size=1, device="cpu")
    assert tiny_cost.flops == benchmark.flops_an_image("tiny", "sampling", config)


def test_what_lives_at_once():
    x = torch.zeros(1000)
    with Alive([x]) as alive:
        y = x + 1
        z = y.view(10, 100) * 2  # to look at y otherwise costs nothing
        del y
        w = z + 1
    assert alive.peak == alive.bytes == 4 * sum(map(torch.numel, (x, z, w)))


def test_memory_of_fake_tensors_is_that_of_a_real_step():
    """Of which what autograd keeps is most; what the way back needs for a while comes on top."""
    network, kept = network_for("tiny", 64), {}
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    real = counted_peak(network, 64, 3)

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert counted_peak(network, 64, 3) == real
    least = sum(n for storage, n in kept.items() if storage not in weights)
    assert least < real - 4 * sum(p.numel() for p in network.parameters()) < 1.5 * least
    with FakeTensorMode():
        assert counted_peak(network_for("tiny", 64), 64, 3) == pytest.approx(real, rel=0.01)


def test_memory_is_linear_in_the_batch(tiny_cost):
    with FakeTensorMode():
        few, many = (counted_peak(network_for("tiny", 64), 64, n) for n in (40, 200))
    assert (many - few) / 160 == pytest.approx(tiny_cost.plain.an_image, rel=0.01)
    assert tiny_cost.plain.fixed == 20 * tiny_cost.parameters
    assert tiny_cost.checkpointed.an_image < tiny_cost.plain.an_image / 2


def test_attention_is_all_of_a_resolution_s_attention_layers(tiny_cost):
    """Of `tiny`, all at 8x8: q, k, v, the way out, keys and values of 24 tokens, and two products."""
    c, places, tokens, width = 64, 64, 24, 64
    a_layer = places * 4 * c * c + tokens * 2 * c * width + 2 * places * (places + tokens) * c
    layers = sum(1 for m in network_for("tiny", 64).unet.modules() if hasattr(m, "text_kv"))
    assert tiny_cost.attention == {8: 2 * layers * a_layer}


def test_the_batch_that_fits():
    with_room = TrainingMemory(fixed=4_000_000_000, an_image=100_000_000)
    assert with_room.batch_that_fits(8) == 32  # 0.9 * 8 GB less 4 GB
    assert with_room.batch_that_fits(4) == 0
