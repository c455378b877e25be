"""dsv4 on PyTorch tensors: the CPU reference, and on a GPU the same bytes from the kernels, streams, allocation, compress_quantize."""
import dsv4
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not dsv4.has_cuda,
    reason="no CUDA device" if not torch.cuda.is_available() else "this build of dsv4 has no CUDA",
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def random_rows(rows, cols, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()


def same_bytes(results, expected):
    return [bits(a) == bits(b) for a, b in zip(results, expected, strict=True)]


# ---- both devices ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("scale", [None, 0.02, "row"])
def test_tensors_equal_numpy(device, layout, scale):
    x = random_rows(130, 272, torch.float32)
    results = dsv4.quantize(x.to(device), global_scale=scale, sf_layout=layout)
    assert all(r.device.type == device for r in results)
    for got, want in zip(results, dsv4.quantize(x.numpy(), global_scale=scale, sf_layout=layout), strict=True):
        assert np.array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_results_are_torch_bfloat16(device):
    x = random_rows(4, 64, torch.float32)
    assert torch.equal(dsv4.quantize(x.to(device), format="bf16").cpu(), x.to(torch.bfloat16))
    codes, sf = dsv4.quantize(x.to(device))
    y = dsv4.dequantize(codes, sf, dtype="bfloat16")
    assert y.dtype == torch.bfloat16 and torch.equal(y, dsv4.dequantize(codes, sf).to(torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_and_float8_scales(device):
    weight = torch.nn.Parameter(random_rows(4, 64).to(device))
    codes, sf = dsv4.quantize(weight)
    assert same_bytes((codes, sf), dsv4.quantize(weight.detach())) == [True, True]
    assert torch.equal(dsv4.dequantize(codes, sf.view(torch.float8_e4m3fn)), dsv4.dequantize(codes, sf))


@pytest.mark.parametrize("device", DEVICES)
def test_gather(device):
    codes, sf, scale = dsv4.quantize(random_rows(40, 512).to(device), global_scale="row")
    whole = dsv4.dequant_nvfp4(codes, sf, scale)
    indices = torch.tensor([39, -1, 7, 7], dtype=torch.int32, device=device)
    rows = dsv4.dequant_nvfp4_selective(codes, sf, scale, indices)
    assert torch.equal(rows, torch.where(indices[:, None] < 0, 0.0, whole[indices.clamp(min=0).long()]))
    indices[2] = 40
    with pytest.raises(ValueError, match=r"found 40 at \[2\]"):
        dsv4.dequantize_rows(codes, sf, indices, scale)


# ---- GPU ----


@needs_gpu
def test_swiglu_and_inverse_rope_equal_the_cpu():
    gate, up, rho = random_rows(33, 512, seed=1), random_rows(33, 512, seed=2), torch.rand(33)
    want = dsv4.swiglu_quantize(gate, up, rho, global_scale="row")
    assert same_bytes(dsv4.swiglu_quantize(gate.cuda(), up.cuda(), rho.cuda(), global_scale="row"), want) == [True] * 3
    x = random_rows(5 * 16, 512, seed=3).view(5, 16, 512)
    angle = torch.outer(torch.arange(9.0), 0.5 ** torch.arange(32.0))
    cos_sin, positions = torch.cat([angle.cos(), angle.sin()], 1), torch.tensor([8, 0, 3, 3, 1], dtype=torch.int32)
    for options in ({"sf_layout": "128x4"}, {"format": "fp8"}):
        want = dsv4.inverse_rope_quantize(x, cos_sin, positions, 8, **options)
        assert same_bytes(dsv4.inverse_rope_quantize(x.cuda(), cos_sin.cuda(), positions.cuda(), 8, **options), want) == [True] * 2
    with pytest.raises(ValueError, match=r"positions: .* found 8 at \[0\]"):
        dsv4.inverse_rope_quantize(x.cuda(), cos_sin[:8].cuda(), positions.cuda(), 8)


@needs_gpu
@pytest.mark.parametrize("explicit", [False, True])
def test_the_current_or_given_stream_is_used(explicit):
    x = random_rows(512, 4096).cuda()
    want = dsv4.quantize(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a call on any other stream would read zeros
        late.copy_(x)
        if not explicit:
            results = dsv4.quantize(late)
    if explicit:
        results = dsv4.quantize(late, stream=side.cuda_stream)
    side.synchronize()
    assert same_bytes(results, want) == [True, True]


@needs_gpu
def test_graph_capture_without_index_checks():
    codes, sf = dsv4.quantize(random_rows(40, 512).cuda())
    indices = torch.zeros(4, dtype=torch.int32, device="cuda")
    y = torch.empty(4, 512, device="cuda")
    dsv4.dequantize_rows(codes, sf, indices, check_indices=False, out=y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dsv4.dequantize_rows(codes, sf, indices, check_indices=False, out=y)
    indices.copy_(torch.tensor([5, -1, 39, 99]))
    graph.replay()
    whole = dsv4.dequantize(codes, sf)
    zero = torch.zeros_like(whole[0])
    assert torch.equal(y, torch.stack([whole[5], zero, whole[39], zero]))  # 99 is out of range: never read, zeros


@needs_gpu
def test_device_errors():
    codes, sf = dsv4.quantize(random_rows(4, 64).cuda())
    with pytest.raises(ValueError, match="sf: expected device cuda:0 as codes, found cpu"):
        dsv4.dequantize(codes, sf.cpu())
    with pytest.raises(ValueError, match="x: expected data aligned to 16 bytes"):
        dsv4.quantize(torch.zeros(65, device="cuda")[1:].view(1, 64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, ratio, dim, width, state_rows, row_format, row_bytes", [("csa", 4, 512, 1024, 8, "nvfp4", 384), ("indexer", 4, 128, 256, 8, "fp8", 132)])
def test_compressing_token_by_token_gives_the_chunks_pages(device, kind, ratio, dim, width, state_rows, row_format, row_bytes):
    tokens = 12
    windows = tokens // ratio
    value, gate = random_rows(tokens, width, torch.float32, 1).to(device), random_rows(tokens, width, torch.float32, 2).to(device)
    shared = [random_rows(ratio, width, torch.float32, 3).to(device), random_rows(1, dim, seed=4)[0].to(device), random_rows(windows, 64, torch.float32, 5).to(device)]

    def fresh():
        page_bytes = (4 * row_bytes + 15) // 16 * 16
        return torch.zeros(1, state_rows, width, device=device), torch.full((1, state_rows, width), -torch.inf, device=device), torch.zeros(1, page_bytes, dtype=torch.uint8, device=device)

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    options = dict(row_format=row_format, rows_per_page=4)
    state_value, state_gate, chunk_pages = fresh()
    ids = int32(*range(windows))
    dsv4.compress_quantize(kind, value, gate, *shared, state_value[0], state_gate[0], chunk_pages, ids, ids, first_position=0, **options)
    state_value, state_gate, pages = fresh()
    for p in range(tokens):
        window = int32(p // ratio)
        dsv4.compress_quantize(
            kind, value[p : p + 1], gate[p : p + 1], *shared, state_value, state_gate, pages, window, window, positions=int32(p), states=int32(0), **options
        )
    assert bool(chunk_pages.any()) and torch.equal(pages, chunk_pages)
    with pytest.raises(ValueError, match=r"states: expected 0 <= index < 1 \(states\), found 1 at \[0\]"):
        dsv4.compress_quantize(
            kind, value[:1], gate[:1], *shared, state_value, state_gate, pages, int32(0), int32(0), positions=int32(0), states=int32(1), **options
        )
