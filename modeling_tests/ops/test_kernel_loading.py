"""Where a kernel comes from, what happens when there is none, and which code is chosen."""

import json
import logging
import shutil
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
import torch

from hf_denseseg.cli import main
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops import (
    kernel_build,
    kernel_loading,
    kernel_paths,
    kernelize_deformable_attention,
    ms_deform_attn,
)
from hf_denseseg.ops.kernel_loading import KERNEL, choose_path, find_hub_kernel, find_kernel
from hf_denseseg.ops.reference import ms_deform_attn_reference
from msda_cases import needs_kernel, random_call

SHAPES = [(6, 9), (3, 4)]
RESULT = "return _narrow(out, value), lse"
with_kernel = pytest.mark.skipif(bool(needs_kernel()), reason=needs_kernel() or "there is one")
with_compiler = pytest.mark.skipif(kernel_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def fresh_search():
    """Forget what was found, before and after a test that changes where to search."""
    find_kernel.cache_clear()
    find_hub_kernel.cache_clear()
    yield
    find_kernel.cache_clear()
    find_hub_kernel.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build in a temporary folder."""
    folder = tmp_path_factory.mktemp("build")
    kernel_build.build(output=folder)
    return folder


@pytest.fixture
def copy_of_build(built, tmp_path):
    """The CPU build under another name, since torch registers the operators of a name once per process."""
    folder = tmp_path / "kernel"
    variant = shutil.copytree(next(built.glob("*cpu*")), folder / next(built.glob("*cpu*")).name)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    other = name[:-12] + uuid.uuid4().hex[:12]
    for path in (variant / "metadata.json", variant / "_ops.py", next(variant.glob("*.so"))):
        path.write_bytes(path.read_bytes().replace(name.encode(), other.encode()))
    return folder


def use(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{KERNEL}={folder}")


def expect_plain_torch(caplog, reason):
    """The call works, in plain torch, and one warning says why."""
    call = random_call(SHAPES)
    with caplog.at_level(logging.WARNING):
        found = [ms_deform_attn(*call, SHAPES) for _ in range(2)]
    assert torch.equal(found[0], ms_deform_attn_reference(*call, SHAPES))
    warnings = [record.message for record in caplog.records if "plain torch" in record.message]
    assert len(warnings) == 1
    assert reason in warnings[0]


@with_compiler
def test_local_kernels_names_a_build(built, monkeypatch, fresh_search):
    use(built, monkeypatch)
    assert str(find_kernel("cpu").source).startswith(f"LOCAL_KERNELS {built}")
    assert choose_path(*random_call(SHAPES)[:2]) == "compiled"


@with_compiler
def test_a_second_build_of_the_same_sources_does_nothing(built):
    variant = kernel_build.build(output=built)[0]
    before = (variant / "_ms_deform_attn.abi3.so").stat().st_mtime_ns
    assert (kernel_build.build(output=built)[0] / "_ms_deform_attn.abi3.so").stat().st_mtime_ns == before


@with_compiler
def test_the_library_uses_the_stable_abi_of_torch_only(built):
    """C++ symbols of torch in it would bind it to one version."""
    library = next(built.glob("*cpu*/*.so"))
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    foreign = [line for line in names.splitlines() if "_ZN2at" in line or "_ZN3c10" in line]
    assert "aoti_torch" in names
    assert not foreign


@with_compiler
@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "LOCAL_KERNELS"),
        (lambda folder: next(folder.glob("*.so")).write_bytes(b"no library"), "Could not load"),
        (lambda folder: folder.rename(folder.with_name("torch-stable-abi211-cpu-mips-linux")), "mips"),
        (lambda folder: folder.rename(folder.with_name("torch26-cxx11-cpu-x86_64-linux")), "torch26"),
        (lambda folder: (folder / "metadata.json").write_text("{"), "metadata"),
        (lambda folder: replace(folder / "__init__.py", "INTERFACE = 1", "INTERFACE = 2"), "interface 2"),
        (lambda folder: replace(folder / "_cpu.py", RESULT, "return 2 * out, lse"), "differ"),
        (lambda folder: replace(folder / "_cpu.py", RESULT, "raise OSError('x')"), "first"),
    ],
    ids=["gone", "no-library", "processor", "torch", "metadata", "interface", "wrong-result", "raises"],
)
def test_a_broken_kernel_folder_falls_back_with_the_reason(
    copy_of_build, corrupt, reason, monkeypatch, caplog, fresh_search
):
    corrupt(next(copy_of_build.glob("*cpu*")))
    use(copy_of_build, monkeypatch)
    expect_plain_torch(caplog, reason)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_without_build_and_network_plain_torch_runs(tmp_path, monkeypatch, caplog, fresh_search):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(kernel_loading, "BUILD", tmp_path / "nothing")
    expect_plain_torch(caplog, f"hub {KERNEL}")


def test_without_the_kernels_library_plain_torch_runs(monkeypatch, caplog, fresh_search):
    monkeypatch.setitem(sys.modules, "kernels", None)
    expect_plain_torch(caplog, "hf-denseseg[kernels]")


def test_the_hub_is_asked_for_one_version_of_trusted_publishers(tmp_path, monkeypatch, fresh_search):
    """A stand-in for the library records the requests."""
    asked = []
    stand_in = SimpleNamespace(get_kernel=lambda *args, **options: asked.append((args, options)) or SimpleNamespace())
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    monkeypatch.setattr(kernel_loading, "BUILD", tmp_path / "nothing")
    find_kernel("cpu")
    find_hub_kernel()
    assert asked == [
        ((KERNEL,), {"version": 1, "backend": "cpu", "trust_remote_code": [KERNEL]}),
        (("kernels-community/deformable-detr",), {"version": 1}),
    ]


class FakeTensor(SimpleNamespace):
    """The attributes of a tensor that the choice reads."""


def described(device, dtype=torch.float32, levels=3, points=16):
    value = FakeTensor(device=SimpleNamespace(type=device), dtype=dtype, shape=torch.Size((1, 12, 8, 32)))
    return value, FakeTensor(dtype=torch.float32, shape=torch.Size((1, 4, 8, levels, points, 2)))


@pytest.mark.parametrize(
    ("device", "dtype", "own", "hub", "forced", "path"),
    [
        ("cpu", torch.float32, True, True, "auto", "compiled"),
        ("cpu", torch.bfloat16, True, False, "auto", "compiled"),
        ("cpu", torch.float32, False, True, "auto", "reference"),
        ("cpu", torch.float64, True, True, "auto", "reference"),
        ("cuda", torch.float32, True, True, "auto", "triton"),
        ("cuda", torch.float32, False, True, "auto", "hub"),
        ("cuda", torch.float32, True, False, "auto", "triton"),
        ("cuda", torch.bfloat16, True, True, "auto", "triton"),
        ("cuda", torch.bfloat16, False, True, "auto", "hub"),
        ("cuda", torch.float32, False, False, "auto", "reference"),
        ("mps", torch.float32, True, True, "auto", "reference"),
        ("cuda", torch.float32, True, True, "triton", "triton"),
        ("cuda", torch.float32, True, True, "hub", "hub"),
        ("cpu", torch.float32, True, True, "compiled", "compiled"),
        ("cpu", torch.float32, True, True, "reference", "reference"),
        ("cuda", torch.float32, True, True, "compiled", None),
        ("cpu", torch.float32, True, True, "triton", None),
        ("cpu", torch.float32, False, True, "compiled", None),
        ("cpu", torch.float64, True, True, "compiled", None),
        ("cpu", torch.float32, True, True, "hub", None),
        ("cuda", torch.float32, True, False, "hub", None),
        ("cpu", torch.float32, True, True, "fastest", None),
    ],
)
def test_every_row_of_the_dispatch_table(device, dtype, own, hub, forced, path, monkeypatch):
    reasons = {"source": "it is missing"}
    kernel = SimpleNamespace(unserved=lambda value, points: "no float64" if value.dtype == torch.float64 else None)
    ours = (
        kernel_loading.Search(kernel, "here")
        if own and device != "mps"
        else kernel_loading.Search(None, None, reasons)
    )
    theirs = kernel_loading.Search(kernel, "hub") if hub else kernel_loading.Search(None, None, reasons)
    monkeypatch.setattr(kernel_loading, "find_kernel", lambda device_type: ours)
    monkeypatch.setattr(kernel_loading, "find_hub_kernel", lambda: theirs)
    monkeypatch.setenv("DENSESEG_MSDA", forced)
    if path is not None:
        assert choose_path(*described(device, dtype)) == path
        return
    with pytest.raises(InputError, match=f"DENSESEG_MSDA={forced}"):
        choose_path(*described(device, dtype))


def test_a_graph_for_onnx_is_made_of_plain_torch(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert choose_path(*described("cpu")) == "reference"


def test_more_points_than_the_kernel_takes_run_in_plain_torch():
    assert choose_path(*described("cpu", levels=5, points=64)) == "reference"


@with_kernel
def test_deformable_detr_of_transformers_runs_on_our_kernel():
    """Through the mapping of the kernels library; same boxes and gradients."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=10, num_labels=5, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name or "bbox" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pixel_values = torch.randn(1, 3, 96, 128)

    def outcome():
        output = model(pixel_values)
        model.zero_grad()
        (output.logits.square().sum() + output.pred_boxes.square().sum()).backward()
        return output.logits, output.pred_boxes, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    kernel = find_kernel("cpu").kernel
    ours = type(kernel.layers.MultiScaleDeformableAttention())
    before = outcome()
    assert kernelize_deformable_attention(model) is model
    replaced = [m for m in model.modules() if type(m).__name__ == ours.__name__]
    assert [module.forward.__func__.__qualname__ for module in replaced] == [ours.forward.__qualname__] * 3
    after = outcome()
    torch.testing.assert_close(after[:2], before[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[2], before[2], atol=1e-3, rtol=1e-3)


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(InputError, match="no MultiScaleDeformableAttention"):
        kernelize_deformable_attention(torch.nn.Linear(2, 2))


@with_compiler
def test_the_command_builds_and_says_how_to_use_it(built, tmp_path, capsys):
    shutil.copytree(built, tmp_path / "out")  # up to date, so that nothing has to be compiled
    assert main(["kernels", "build", "--output_dir", str(tmp_path / "out")]) == 0
    assert f"export LOCAL_KERNELS={KERNEL}={tmp_path / 'out'}" in capsys.readouterr().out


@with_compiler
def test_a_failing_compiler_is_quoted(tmp_path):
    source = shutil.copytree(kernel_paths.SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    for file in (source / "ms_deform_attn_cpu").glob("*.cpp"):  # the others need not be compiled
        file.write_text("this is no C++" if file.stem == "generic" else "")
    with pytest.raises(RunError, match=r"generic\.cpp"):
        kernel_build.build(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_building_without_a_compiler_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["kernels", "build"]) == 2
    assert "apt install g++" in capsys.readouterr().err
    assert main(["kernels", "build", "--optional"]) == 0
    assert "plain PyTorch" in capsys.readouterr().out


def test_building_without_the_sources_says_where_they_are(tmp_path, capsys):
    assert main(["kernels", "build", "--source", str(tmp_path)]) == 2
    assert "kernels/ms-deform-attn" in capsys.readouterr().err


@with_kernel
def test_the_command_says_what_will_run(capsys):
    assert main(["kernels", "info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["runs"] == "compiled"
    assert report["cpu"]["instruction set"] in ("generic", "AVX2", "AVX-512")
    assert report["cuda"]["runs"] in ("reference", "triton", "hub (eager)")
