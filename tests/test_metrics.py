"""Rates count only training time, and say so; the peak of a device is found by its name."""

import time

import torch

from nanolm.config.model import ModelConfig
from nanolm.training import throughput
from nanolm.training.flops import largest_products
from nanolm.training.sinks import line_of


def test_rates_leave_out_what_is_excluded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = throughput.Throughput(tokens_per_step=100, flops_per_step=1e6, peak=4e6)
    for _ in range(3):
        now[0] += 2
        clock.add_step(waited=0.5)
    with clock.excluded():
        now[0] += 100
    figures = clock.speeds(torch.device("cpu"))
    assert figures["tokens_per_second"] == 50
    assert figures["mfu"] == 3e6 / 6 / 4e6
    assert figures["tflops"] == 3e6 / 6 / 1e12
    assert figures["data_wait"] == 0.25 and figures["memory"] > 10**6
    now[0] += 1
    clock.add_step(waited=0)
    assert clock.speeds(torch.device("cpu"))["tokens_per_second"] == 100
    assert clock.overall == 400 / 7


def test_peaks_by_device_name(monkeypatch):
    name = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    device = torch.device("cuda", 0)
    for name[:], precision, peak in (
        (["NVIDIA A100-SXM4-80GB"], "bf16", 312e12),
        (["NVIDIA H100 80GB HBM3"], "bf16", 989e12),
        (["NVIDIA H100 PCIe"], "fp32", 51e12),
        (["NVIDIA GeForce RTX 4090"], "fp16", 165.2e12),
        (["NVIDIA H100 NVL"], "bf16", 835e12),
        (["NVIDIA H200"], "bf16", 989e12),
        (["NVIDIA H20"], "bf16", 148e12),
        (["NVIDIA A10G"], "bf16", 70e12),
        (["NVIDIA A10"], "bf16", 125e12),
        (["NVIDIA RTX A6000"], "bf16", 154.8e12),
        (["NVIDIA L4"], "fp32", 30.3e12),
        (["NVIDIA L40S"], "bf16", 362e12),
        (["Tesla T4"], "fp16", 65e12),
        (["Tesla V100-SXM2-32GB"], "fp16", 125e12),
        (["Tesla V100-PCIE-16GB"], "fp16", 112e12),
        (["NVIDIA GB200"], "bf16", 2500e12),
        (["NVIDIA B300 SXM6 AC"], "bf16", 2250e12),
        (["NVIDIA H800"], "bf16", 989e12),
        (["AMD Instinct MI250X"], "bf16", 191.5e12),
        (["AMD Instinct MI325X"], "bf16", 1307.4e12),
        (["NVIDIA RTX A1000"], "bf16", None),  # no A100
        (["NVIDIA A100-SXM4-40GB MIG 1g.5gb"], "bf16", None),
        (["NVIDIA GeForce RTX 4090 Laptop GPU"], "bf16", None),
        (["Nobody's GPU"], "bf16", None),
    ):
        found, origin = throughput.peak_flops(device, precision)
        assert found == peak and name[0] in origin
    found, origin = throughput.peak_flops(torch.device("cpu"), "fp32")
    assert found > 1e8 and "measured" in origin


def test_the_peak_of_a_cpu_is_that_of_the_models_own_products(monkeypatch):
    asked = []

    def measured(dtype, product, seconds):
        asked.append((dtype, product))
        return float(product[0])

    monkeypatch.setattr(throughput, "matmul_flops", measured)
    monkeypatch.setattr(throughput, "multiplies_bf16", lambda: False)
    model = ModelConfig(d_model=96, d_ff=256, n_heads=4, vocab_size=1000)
    products = largest_products(model, tokens=2048)
    assert products == [(2048, 96, 256), (2048, 256, 96), (96, 2048, 256), (512, 96, 1000)]
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.float32)):
        asked.clear()
        peak, told = throughput.peak_flops(torch.device("cpu"), precision, products)
        assert peak == 2048 and "2048 x 96 x 256" in told
        assert asked == [(dtype, product) for product in products]
    monkeypatch.setattr(throughput, "multiplies_bf16", lambda: True)
    throughput.peak_flops(torch.device("cpu"), "bf16", products)
    assert asked[-1][0] == torch.bfloat16  # where bf16 products are bf16 products


def test_the_peak_of_a_cpu_leaves_out_a_slow_first_product(monkeypatch):
    now, took = [0.0], iter([5.0, 0.3, 0.1, *[0.2] * 9])

    class Matrix:
        def __matmul__(self, other: object) -> None:
            now[0] += next(took)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "ones", lambda *size, dtype: Matrix())
    found = throughput.matmul_flops(torch.float32, (100, 100, 100), seconds=1.0)
    assert abs(found / (2 * 100**3 / 0.1) - 1) < 1e-9


def test_without_a_peak_the_rate_is_still_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = throughput.Throughput(tokens_per_step=100, flops_per_step=3e12, peak=None)
    now[0] += 2
    clock.add_step(waited=0)
    figures = clock.speeds(torch.device("cpu"))
    assert figures["mfu"] is None and figures["tflops"] == 1.5
    line = line_of({"kind": "train", "step": 1, **figures})
    assert "1.50 TFLOP/s" in line and "mfu" not in line
