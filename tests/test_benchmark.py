"""The benchmarks count what they should, time other implementations fairly, and refuse bad input."""

import json
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.cli import run_command
from common.files import ROOT
from common.results.flops import flop_counter
from common.results.timing import synchronize, time_interleaved
from common.training import trainer
from lesson_06_miniglide.benchmarks import roofline, scaling, speed
from lesson_06_miniglide.benchmarks.peak_rates import measure_peak_rates
from lesson_06_miniglide.benchmarks.roofline import OpProfiler, kind_of
from lesson_06_miniglide.benchmarks.scaling import (
    LiveBytes,
    TrainingMemory,
    forward_flops,
    peak_bytes,
    preset_network,
    scaling_row,
    training_memory,
)

ADAPTER = """
from torch import nn

def build_network(image_shape):
    return nn.Conv2d(image_shape[0], 5, 3, padding=1)

def call(network, x_t, t):
    return network(x_t)
"""


def run(*flags, script=speed):
    run_command(script.main, script.Config, argv=flags if script is scaling else [*flags, "--device", "cpu"])


def test_a_table_with_another_implementation_next_to_ours(tmp_path, capsys):
    (tmp_path / "against_mine.py").write_text(ADAPTER)
    out = tmp_path / "speed.json"
    few = ["--batch-size", "2", "--rounds", "1"]
    run("lesson_03", "--against", str(tmp_path / "against_mine.py"), *few, "--out", str(out))
    content = json.loads(out.read_text())
    rows = {(row["network"], row["work"]): row for row in content["rows"]}
    assert set(rows) == {(name, work) for name in ("lesson_03", "mine") for work in ("training", "sampling")}
    conv3x3 = 2 * 5 * 9 * 32 * 32 / 1e9  # a multiplication and an addition for each weight and position
    assert rows["mine", "sampling"]["gflop_per_image"] == pytest.approx(conv3x3)
    # in training also the gradient of the weights
    assert rows["mine", "training"]["gflop_per_image"] == pytest.approx(2 * conv3x3)
    assert rows["mine", "sampling"]["parameters"] == 5 * 9 + 5
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]) and row["peak_fraction"] > 0
        assert speed.COLUMN_TITLES.keys() <= row.keys()
    assert content["peak_rates"]["tflops"] > 0 and "against" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lesson_03", "lesson_05"])
@pytest.mark.parametrize("library", ["diffusers", "denoising_diffusion"])
def test_other_people_s_networks_cost_as_many_flops_as_ours(name, library):
    pytest.importorskip(library.replace("denoising_diffusion", "denoising_diffusion_pytorch"))
    text = "_text" if (name, library) == ("lesson_05", "diffusers") else ""
    theirs = str(ROOT / "lesson_06_miniglide/benchmarks/adapters" / f"against_{library}{text}.py")
    config = speed.Config(networks=(name,), against=(theirs,))
    for work in ("training", "sampling"):
        ours = speed.flops_per_image(name, work, config)
        flops = speed.flops_per_image(theirs, work, config)
        assert flops == pytest.approx(ours, rel=0.1)


def test_operations_are_counted_by_kind():
    a, x = torch.randn(64, 64), torch.randn(1000)
    with OpProfiler(torch.device("cpu")) as profiler:
        a @ a
        x.view(10, 100) + 1.0  # reads and writes; the view costs nothing
        torch.nn.functional.group_norm(a[None], 4)
    matmul, sum_, norm = (profiler.stats[kind] for kind in ("matmuls", "elementwise and other", "norms"))
    assert (matmul.calls, matmul.flops, matmul.bytes) == (1, 2 * 64**3, 3 * 64**2 * 4)
    assert (sum_.calls, sum_.flops, sum_.bytes) == (1, 0, 2 * 1000 * 4)
    assert norm.calls == 1 and norm.seconds > 0 and len(profiler.stats) == 3
    assert kind_of("aten._foreach_norm") == kind_of("aten._fused_adamw_") == "optimizer, EMA"


def test_fused_attention_is_counted():
    shape, n = (2, 3, 300, 16), 2 * 3 * 300 * 300 * 16  # a multiplication and an addition each
    q, k, v = torch.randn(3, *shape).requires_grad_()
    with flop_counter() as counter:
        answer = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * n  # scores, and values weighted by them
    with flop_counter() as counter:
        answer.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * n  # the scores once more, and four gradients


def test_a_step_has_the_flops_that_the_benchmark_counts(tmp_path):
    few = ["--batch-size", "2", "--rounds", "1"]
    run("lesson_03", "--fp32", *few, "--out", str(tmp_path / "roofline.json"), script=roofline)
    run("lesson_03", "--fp32", *few, "--out", str(tmp_path / "speed.json"))
    profile, timed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("roofline", "speed"))
    *kinds, whole = profile["rows"]
    assert whole["gflop"] == pytest.approx(2 * timed["rows"][0]["gflop_per_image"], rel=1e-6)
    assert sum(row["step_fraction"] for row in kinds) == pytest.approx(1)
    assert kinds[0]["seconds"] == max(row["seconds"] for row in kinds)
    assert whole["least_seconds"] == pytest.approx(sum(row["least_seconds"] for row in kinds))
    by_kind, rates = {row["kind"]: row for row in kinds}, profile["peak_rates"]
    convolutions, norms = by_kind["convolutions"], by_kind["norms"]
    assert convolutions["gflop"] / convolutions["gb"] > 10 and norms["gflop"] == 0
    assert norms["least_seconds"] == pytest.approx(norms["gb"] / rates["copy_gb_per_second"])
    assert roofline.COLUMN_TITLES.keys() == norms.keys()


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

def build_network(image_shape):
    return Large()

def call(network, x_t, t):
    return network(x_t)
"""


def measure_in_process(job):
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(speed.measure_size, job).result()


@pytest.mark.skipif(not speed.PROCESS_STATUS.exists(), reason="only Linux reports it")
def test_peak_memory_is_that_of_a_step_in_the_middle_of_training(tmp_path):
    """Weights, EMA, moments, five tensors kept for the backward pass, two in it: 20 million numbers each.

    Fragmentation differs from process to process, so we take the least of three.
    """
    (path := tmp_path / "large.py").write_text(LARGE)
    config = speed.Config(networks=("lesson_01",), against=(str(path),), device="cpu")
    job = speed.Job(str(path), "training", 1, config)
    sizes = [measure_in_process(job) for _ in range(3)]
    assert {parameters for parameters, _ in sizes} == {20_000_000}
    numbers = min(memory_mb for _, memory_mb in sizes) * 1e6 / 4 / 20e6
    assert 4 + 5 + 2 <= numbers < 16


def test_only_our_networks_keep_freed_memory(tmp_path, monkeypatch):
    (path := tmp_path / "mine.py").write_text(ADAPTER)
    config = speed.Config(networks=("lesson_01",), against=(str(path),), device="cpu")
    kept = []
    for name in ("lesson_01", str(path)):
        for module in (speed, trainer):
            monkeypatch.setattr(module, "keep_freed_memory", partial(kept.append, name))
        for work in ("training", "sampling"):
            speed.prepare.__wrapped__(speed.Job(name, work, 1, config))
    assert set(kept) == {"lesson_01"}


class SameProcess:
    """Stands for a ProcessPoolExecutor."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        (future := Future()).set_result(function(*args))
        return future


def test_every_round_takes_one_step_of_each_network(monkeypatch):
    taken = []
    monkeypatch.setattr(speed, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(speed, "prepare", lambda job: (partial(taken.append, job.name), 7, 1.5))
    monkeypatch.setattr(speed, "flops_per_image", lambda *_: 10**9)
    monkeypatch.setattr(speed.time, "perf_counter", iter([0, 1, 0, 5, 0, 4, 0, 5, 0, 2, 0, 5]).__next__)
    names, config = ("lesson_01", "lesson_03"), speed.Config(device="cpu")
    rows = speed.measure([speed.Job(name, "sampling", 4, config) for name in names], 3, 0.1)
    assert taken == ["lesson_01", "lesson_03"] * 3
    assert [(row["seconds"], row["slowest"], row["images_per_second"]) for row in rows] == [
        (2, 4, 2),
        (5, 5, 0.8),
    ]
    assert rows[0]["tflops"] == pytest.approx(0.002) and rows[0]["peak_fraction"] == pytest.approx(0.02)
    assert (rows[0]["parameters"], rows[0]["memory_mb"]) == (7, 1.5)


def test_other_devices_are_synchronized(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cpu", "cuda", "mps"):
        synchronize(torch.device(name))
    assert [device.type for device in waited] == ["cuda", "mps"]


def test_interleaved_steps_are_called_equally_often_and_the_first_time_does_not_count():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = time_interleaved(steps, 3, torch.device("cpu"))
    assert called == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]


def test_peak_rates_are_those_of_the_type_that_networks_compute_in(monkeypatch, capsys):
    module = "lesson_06_miniglide.benchmarks.peak_rates"
    monkeypatch.setattr(f"{module}.time_interleaved", lambda *_: {"matmul": [2.0, 1.0], "copy": [0.5]})
    for bf16_is_fast in (True, False):
        monkeypatch.setattr("common.device.has_fast_bf16", lambda device, fast=bf16_is_fast: fast)
        for precision in ("auto", "fp32"):
            rates = measure_peak_rates(precision, torch.device("cpu"))
            assert rates.tflops == pytest.approx(2 * 2048**3 / 1e12)  # of the faster matmul
            assert rates.copy_gb_per_second == pytest.approx(2 * 2 * 4 * 64 * 1024**2 / 1e9)
            in_bf16 = "bfloat16" in capsys.readouterr().out
            assert in_bf16 == (bf16_is_fast and precision == "auto")


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("", [], "no `build_network`"),
        ("def build_network(:", [], "cannot be used"),
        (None, [], "cannot be used"),
        (ADAPTER, ["--rounds", "0"], "--rounds is 0"),
        (ADAPTER, ["--batch-size", "8", "0"], "--batch-size is 0"),
        (ADAPTER, ["--out", "mine.py/speed.json"], "--out mine.py cannot be created"),
    ],
)
def test_bad_input_is_one_line(text, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as caught:
        run("lesson_01", "--against", str(tmp_path / "mine.py"), *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "script, network, flags, message",
    [
        (speed, "lesson_7", [], "network lesson_7 is unknown"),
        (roofline, "lesson_7", [], "network lesson_7 is unknown"),
        (scaling, "lesson_01", [], "preset lesson_01 is unknown"),
        (scaling, "tiny", ["--image-size", "64", "36"], "--image-size 36: tiny needs a multiple of 8"),
        (scaling, "tiny", ["--image-size", "0"], "--image-size is 0"),
        (speed, "lesson_01", ["--cuda-graph"], "--cuda-graph needs an NVIDIA GPU"),
        (speed, "lesson_01", ["--against", "mine"], "--against mine cannot be used (it must be a .py file)"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, network, flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(network, *flags, script=script)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_memory():
    return training_memory(lambda: preset_network("tiny"))


def test_counted_flops_are_those_of_a_real_evaluation():
    real = speed.flops_per_image("tiny", "sampling", speed.Config(networks=("tiny",)))
    assert forward_flops(lambda: preset_network("tiny")) == real


def test_what_is_alive_at_once():
    x = torch.zeros(1000)
    with LiveBytes([x]) as live:
        y = x + 1
        z = y.view(10, 100) * 2  # the view of y costs nothing
        del y
        w = z + 1
    assert live.peak == live.bytes == 4 * sum(map(torch.numel, (x, z, w)))


def test_memory_of_fake_tensors_is_that_of_a_real_step():
    """Most of it is what autograd saves; temporary tensors of the backward pass come on top."""
    network, kept = preset_network("tiny", 64), {}
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    real = peak_bytes(network, 3)

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert peak_bytes(network, 3) == real
    least = sum(n for storage, n in kept.items() if storage not in weights)
    assert least < real - 4 * sum(p.numel() for p in network.parameters()) < 1.5 * least
    with FakeTensorMode():
        assert peak_bytes(preset_network("tiny", 64), 3) == pytest.approx(real, rel=0.01)


def test_memory_is_linear_in_the_batch(tiny_memory):
    with FakeTensorMode():
        few, many = (peak_bytes(preset_network("tiny"), n) for n in (40, 200))
    assert (many - few) / 160 == pytest.approx(tiny_memory.per_image, rel=0.01)
    assert tiny_memory.fixed == 20 * sum(p.numel() for p in preset_network("tiny").parameters())


def test_checkpointing_more_than_halves_the_memory_per_image(tiny_memory):
    row = scaling_row("tiny", 64)
    assert row["checkpointed_mb_per_image"] < row["mb_per_image"] / 2
    assert row["mb_per_image"] == pytest.approx(tiny_memory.per_image / 1e6)
    assert row["fixed_gb"] == pytest.approx(tiny_memory.fixed / 1e9)
    assert scaling.COLUMN_TITLES.keys() == row.keys()
    assert row["batch_in_8_gb"][0] == tiny_memory.max_batch_size(8) < row["batch_in_8_gb"][1]


def test_frozen_parameters_need_neither_gradients_nor_moments(tiny_memory):
    def with_frozen_text_encoder():
        network = preset_network("tiny")
        network.network.text_encoder.requires_grad_(False)
        return network

    memory = training_memory(with_frozen_text_encoder)
    frozen = sum(p.numel() for p in preset_network("tiny").network.text_encoder.parameters())
    assert memory.fixed == tiny_memory.fixed - 12 * frozen
    assert 0.9 * tiny_memory.per_image < memory.per_image < tiny_memory.per_image


def test_networks_that_see_more_than_x_t_have_memory_too(tiny_memory):
    for name in ("tiny_upsampler", "tiny_inpainting"):
        memory = training_memory(lambda name=name: preset_network(name))
        assert memory.per_image == pytest.approx(tiny_memory.per_image, rel=0.1)


def test_the_batch_that_fits():
    memory = TrainingMemory(fixed=4_000_000_000, per_image=100_000_000)
    assert memory.max_batch_size(8) == 32  # 0.9 * 8 GB less 4 GB
    assert memory.max_batch_size(4) == 0
