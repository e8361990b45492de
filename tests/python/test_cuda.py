"""What holds on a GPU beyond what every backend does: graphs, streams, launches, devices, the codes of the CPU."""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import octavo
import pytest
from support import CUDA, equal, make

if CUDA.missing:
    pytest.skip(CUDA.missing, allow_module_level=True)

import octavo.torch
import torch
from torch import nn

OPTIONS: list[dict[str, Any]] = [
    {"path": "int8", "outliers": "columns"},
    {"path": "int8", "outliers": "rows"},
    {"path": "int8", "outliers": "static"},
    {"path": "int8", "outliers": "none"},
    {"path": "weight_only"},
    {"path": "auto"},
]
most_launches = 3 if torch.cuda.get_device_capability() >= (8, 0) else 4  # with outliers; 1 for weight-only


def problem(m: int = 96, n: int = 192, k: int = 256, dtype: str = "float16") -> tuple[Any, Any, Any]:
    """X, a weight with kept columns, and a bias."""
    x = CUDA.array(make("outliers", (m, k), dtype), dtype)
    weight = CUDA.array(make("normal", (n, k), dtype, seed=1), dtype)
    bias = CUDA.array(make("normal", (n,), dtype, seed=2), dtype)
    return x, octavo.quantize_weight(weight, outlier_columns=[1, 7, 200]), bias


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("m", [1, 4, 17, 96])
def test_a_captured_call_computes_what_a_direct_one_does(options: dict[str, Any], m: int) -> None:
    x, weight, bias = problem(m)
    octavo.linear(x, weight, bias, **options)  # libraries and kernels are loaded at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = octavo.linear(x, weight, bias, **options)
    for seed in range(3):
        x.copy_(CUDA.array(make("outliers", tuple(x.shape), "float16", seed=seed), "float16"))
        graph.replay()
        equal(CUDA.host(y), CUDA.host(octavo.linear(x, weight, bias, **options)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, weight: octavo.quantize(x),
        lambda x, weight: octavo.dequantize(weight),
        lambda x, weight: octavo.int8_matmul(octavo.quantize(x).codes, weight.codes),
    ],
    ids=["quantize", "dequantize", "int8_matmul"],
)
def test_other_operations_can_be_captured(call: Callable[[Any, Any], Any]) -> None:
    x, weight, _ = problem()
    expected = call(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(x, weight)
    graph.replay()
    if isinstance(result, tuple):
        result, expected = result.codes, expected.codes
    equal(CUDA.host(result), CUDA.host(expected))


def profiled(call: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """What the device did and which functions of the runtime were called, by name, without what the profiler adds."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def names(body: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            body()
            torch.cuda.synchronize()
        of_device = [event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()]
        both = list(zip(of_device, (event.name for event in profile.events()), strict=True))
        return Counter(n for device, n in both if device), Counter(n for device, n in both if not device)

    names(lambda: None)  # the first profile is told of what came before it
    nothing, found = names(lambda: None), names(call)
    return found[0] - nothing[0], found[1] - nothing[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_launches_and_nothing_that_waits(options: dict[str, Any]) -> None:
    x, weight, bias = problem(m=200)
    out = torch.empty(200, 192, dtype=torch.float16, device="cuda")
    for _ in range(2):
        octavo.linear(x, weight, bias, out=out, **options)
    started, calls = profiled(lambda: octavo.linear(x, weight, bias, out=out, **options))
    most = 1 if options["path"] == "weight_only" else most_launches - (options.get("outliers") in {"static", "none"})
    assert 1 <= sum(count for name, count in started.items() if "Memset" not in name) <= most, started
    waits = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"}
    waits |= {"cudaMalloc", "cudaFree", "cudaMemcpy", "cudaMemcpyAsync"}
    assert not waits & set(calls), calls


def test_scratch_memory_is_of_the_pool_of_torch() -> None:
    x, weight, bias = problem(m=4096)
    out = torch.empty(4096, 192, dtype=torch.float16, device="cuda")
    octavo.linear(x, weight, bias, path="int8", out=out)
    octavo.release_cuda_memory()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    octavo.linear(x, weight, bias, path="int8", out=out)
    assert torch.cuda.max_memory_allocated() >= before + 4096 * 256  # the codes of X
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_work_is_ordered_by_the_current_stream(options: dict[str, Any]) -> None:
    x, weight, bias = problem(m=80)
    expected = CUDA.host(octavo.linear(x + 1, weight, bias, **options))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this reads X too early
        moved = x + 1
        y = octavo.linear(moved, weight, bias, **options)
    stream.synchronize()
    equal(CUDA.host(y), expected)


def test_threads_each_with_a_stream() -> None:
    x, weight, bias = problem(m=130)
    expected = CUDA.host(octavo.linear(x, weight, bias))

    def work(_: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                y = octavo.linear(x, weight, bias)
            torch.cuda.current_stream().synchronize()
        equal(CUDA.host(y), expected)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("kind", ["normal", "outliers", "ties", "wide", "nonfinite"])
def test_codes_are_those_of_the_cpu(kind: str, scheme: Any, dtype: str) -> None:
    values = make(kind, (67, 515), dtype)
    on_gpu = octavo.quantize(CUDA.array(values, dtype), scheme=scheme)
    on_cpu = octavo.quantize(CUDA.array(values, dtype).cpu(), scheme=scheme)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        if a is not None:
            equal(CUDA.host(a), b.numpy())


def test_a_model_moves_between_devices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 33)).half()
    model = octavo.torch.quantize_(model)
    x = torch.randn(5, 64).half()
    expected = model(x).float()
    model.cuda()
    assert model[0].weight.shape == (96, 64), "codes are packed in CPU memory only"
    on_gpu = model(x.cuda()).float().cpu()
    torch.testing.assert_close(on_gpu, expected, atol=0.05, rtol=0.02)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.cpu()
    equal(model(x).detach().float().numpy(), expected.detach().numpy())
    model.load_state_dict(state)
    equal(model(x).detach().float().numpy(), expected.detach().numpy())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str) -> None:
    torch.manual_seed(0)
    model = octavo.torch.quantize_(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).half().cuda())
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for m in (100, 100, 3):
        x = torch.randn(m, 64, device="cuda", dtype=torch.float16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), atol=2e-2, rtol=1e-2)


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = octavo.torch.quantize_(nn.Sequential(nn.Linear(64, 48)).cuda())
    x = torch.randn(7, 64, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    on_cpu = octavo.torch.quantize_(nn.Sequential(nn.Linear(64, 48)))
    on_cpu.load_state_dict(layer.state_dict())
    again = x.detach().cpu().requires_grad_()
    on_cpu(again).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), again.grad, atol=1e-4, rtol=1e-4)


def test_arrays_on_different_devices() -> None:
    x, weight, _ = problem()
    with pytest.raises(ValueError, match=r"^linear: weight\.codes: expected memory on cpu, got cuda:0"):
        octavo.linear(x.cpu(), weight)
    with pytest.raises(ValueError, match=r"^linear: bias: expected memory on cuda:0, got cpu"):
        octavo.linear(x, weight, torch.zeros(192))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_every_device() -> None:
    x, weight, bias = problem()
    expected = CUDA.host(octavo.linear(x, weight, bias))
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        y = octavo.linear(x.to(device), weight.to(device), bias.to(device))
        assert y.device == device
        equal(CUDA.host(y), expected)


def test_offsets_beyond_32_bits() -> None:
    m, n, k = 70_000, 40_000, 32
    needed = m * n * 7  # int32 sums, float16 output, and some
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed >> 30} GiB of GPU memory needed, {free >> 30} free")
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    weight = octavo.quantize_weight(torch.randn(n, k, device="cuda", dtype=torch.float16))
    y = octavo.linear(x, weight)
    last = octavo.linear(x[-130:], weight)
    equal(CUDA.host(y[-130:]), CUDA.host(last))
    octavo.release_cuda_memory()


def test_a_capture_refuses_what_must_wait() -> None:
    weight = torch.randn(8, 16, device="cuda")
    octavo.quantize_weight(weight)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
        octavo.quantize_weight(weight)
    torch.cuda.synchronize()
    assert np.isfinite(CUDA.host(weight)).all()
