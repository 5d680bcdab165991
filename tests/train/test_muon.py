import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from families import FAMILIES, REFUSED, build
from trilobit.errors import ConfigError
from trilobit.kernels import bf16
from trilobit.surgery.roles import decoder_layers
from trilobit.surgery.ternary import TernarySpec, ternarize
from trilobit.train.muon import ITERATION, MARGIN, Coefficients, Muon, hidden_matrices, orthogonalize, routing

SIDES = st.integers(1, 40)


def naive(matrix: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """The iteration on singular values alone, in float64: an odd polynomial of a matrix is that of its singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() * MARGIN[coefficients] + 1e-8)
    for a, b, c in ITERATION[coefficients]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@given(SIDES, SIDES, st.integers(1, 3), st.sampled_from(["quintic", "polar-express"]), st.integers(0, 99))
@settings(deadline=None)
def test_the_iteration_is_the_oracles(rows: int, columns: int, number: int, coefficients: Coefficients, seed: int) -> None:
    """In float64, for wide, tall and thin matrices, every matrix of the batch is the oracle's to 1e-10."""
    matrices = torch.randn(number, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = orthogonalize(matrices, coefficients, torch.float64)
    for matrix, result in zip(matrices, found, strict=True):
        assert (result - naive(matrix, coefficients)).norm() <= 1e-10 * min(rows, columns) ** 0.5


@pytest.mark.parametrize("coefficients", ["quintic", "polar-express"])
@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (257, 700), (900, 300), (256, 511), (255, 512)])
def test_grouped_polynomials_are_the_oracles(shape: tuple[int, int], coefficients: Coefficients) -> None:
    """Matrices wide or tall enough that polynomials are multiplied out before they are applied, and those just below."""
    matrices = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix, result in zip(matrices, orthogonalize(matrices, coefficients, torch.float64), strict=True):
        assert (result - naive(matrix, coefficients)).norm() <= 1e-10 * min(shape) ** 0.5


@pytest.mark.parametrize("shape", [(64, 64), (160, 60), (256, 512), (300, 1000)])
def test_polar_express_in_bf16_is_as_near_as_the_plain_iteration(shape: tuple[int, int]) -> None:
    """No nearer peer has it: at most 1.5 times the error of X ← aX + (bA + cA²)X in bf16, as torch.optim.Muon computes."""
    torch.manual_seed(0)
    for spectrum in ("gaussian", "decaying", "steep"):
        for matrix in with_spectrum(*shape, spectrum):
            exact = naive(matrix, "polar-express")
            x = (matrix if shape[0] <= shape[1] else matrix.mT).bfloat16()
            x = x / (x.norm() * MARGIN["polar-express"])
            for a, b, c in ITERATION["polar-express"]:
                gram = x @ x.mT
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            plain = x if shape[0] <= shape[1] else x.mT
            (found,) = orthogonalize(matrix[None], "polar-express")
            assert (found - exact).norm() <= 1.5 * (plain - exact).norm()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few matrices the kernel iterates at once, each is the same to the bit."""
    matrices = torch.randn(5, 20, 30)
    whole = orthogonalize(matrices)
    monkeypatch.setattr("trilobit.train.muon.PIECE_BYTES", 1)
    assert torch.equal(orthogonalize(matrices), whole)


def with_spectrum(rows: int, columns: int, spectrum: str) -> torch.Tensor:
    """Four matrices: Gaussian, or of singular values that fall as 1/√i, or over four decades."""
    matrices = torch.randn(4, rows, columns)
    if spectrum == "gaussian":
        return matrices
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    number = s.shape[-1]
    s = torch.arange(1, number + 1) ** -0.5 if spectrum == "decaying" else torch.logspace(0, -4, number)
    return (u * s) @ v


@pytest.mark.parametrize("spectrum", ["gaussian", "decaying", "steep"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (160, 60), (1, 9), (200, 7), (256, 512), (300, 1000)])
@pytest.mark.parametrize("kernel", [True, False])
def test_bf16_is_as_near_as_torchs(
    shape: tuple[int, int], spectrum: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the error against the float64 oracle is at most 1.5 times that of torch.optim.Muon, with our products and with
    torch's."""
    if not kernel:
        monkeypatch.setattr("trilobit.kernels.bf16.available", lambda: False)
    elif not bf16.available():
        pytest.skip("no native library, or a processor without AVX512-BF16")
    torch.manual_seed(0)
    matrices = with_spectrum(*shape, spectrum)
    ours = orthogonalize(matrices)
    for matrix, result in zip(matrices, ours, strict=True):
        exact = naive(matrix, "quintic")
        theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert (result - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("compute", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("coefficients", "band"), [("quintic", (0.67, 1.15)), ("polar-express", (0.85, 1.15))])
def test_singular_values_end_near_one(coefficients: Coefficients, band: tuple[float, float], compute: torch.dtype) -> None:
    """Whatever they were, from a hundredth of the norm to all of it; in bf16 to its rounding."""
    torch.manual_seed(0)
    rounding = 0.0 if compute == torch.float64 else 0.02
    for largest in (0.1, 1.0):
        values = torch.logspace(-2, 0, 12, dtype=torch.float64) * largest
        u, v = (torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64))[0] for n in (30, 20))
        found = orthogonalize((u @ values.diag() @ v.T)[None], coefficients, compute)[0].double()
        singular = torch.linalg.svdvals(found)[:12]
        assert band[0] - rounding <= singular.min() and singular.max() <= band[1] + rounding
    assert orthogonalize(torch.zeros(1, 3, 5)).abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_by_type_and_complete(family: str) -> None:
    """Every linear of every decoder layer goes to Muon, once, before and after the surgery; gains, biases, embeddings and
    head do not."""
    model = build(family, tied=True)
    assert_routed(model)
    ternarize(model, TernarySpec(scale="row", learned_ranges=True))
    assert_routed(model)
    ranges = {id(p) for name, p in model.named_parameters() if name.endswith("ranges")}
    assert ranges and not ranges & {id(p) for p in hidden_matrices(model)}


def assert_routed(model: nn.Module) -> None:
    chosen = [id(p) for p in hidden_matrices(model)]
    inside = [p for _, layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 2 and p.shape[1] > 1]
    assert len(set(chosen)) == len(chosen) > 0
    assert set(chosen) == {id(p) for p in inside}


@pytest.mark.parametrize(
    ("family", "matrices", "left"),
    [
        ("gpt2", 2 * 4, "transformer.wte.weight, transformer.wpe.weight, 18 vectors and scalars"),
        ("falcon", 2 * 4, "transformer.word_embeddings.weight, 6 vectors and scalars"),
        ("mixtral", 3 * (4 + 2 * 2), "model.embed_tokens.weight, model.layers.*.mlp.gate.weight (3), lm_head.weight, 7 vec"),
    ],
)
def test_matrices_of_other_kinds_are_muons_and_what_is_left_is_named(family: str, matrices: int, left: str) -> None:
    """Conv1D, linears of a kind of their own and the matrices of experts go to Muon; what goes to AdamW is said by name."""
    model = REFUSED[family][0]()
    chosen = hidden_matrices(model)
    assert sum(p.shape[:-2].numel() for p in chosen) == matrices
    inside = [p for _, layer in decoder_layers(model) for n, p in layer.named_parameters() if p.ndim >= 2 and "gate.w" not in n]
    assert {id(p) for p in chosen} == {id(p) for p in inside}
    said = routing(model, chosen)
    assert said.startswith(f"Muon trains {matrices} matrices of ") and f"; AdamW {left}" in said


def test_vectors_in_three_dimensions_are_no_experts() -> None:
    """What is mixed channel by channel (RWKV's [1, 1, C]) has no singular values to even out."""
    model = build("llama")
    model.model.layers[0].mlp.register_parameter("time_mix", nn.Parameter(torch.ones(1, 1, 32)))
    chosen = hidden_matrices(model)
    assert all(p.ndim == 2 for p in chosen)
    assert "model.layers.*.mlp.time_mix" in routing(model, chosen)


def test_an_empty_matrix_is_refused_by_name() -> None:
    """Nothing can be made orthogonal of it, and AdamW does not take it quietly."""
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(48, 0))
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \(48, 0\)"):
        hidden_matrices(model)


@pytest.mark.parametrize("options", [{}, {"normuon": True}, {"state": "bf16"}, {"state": "int8"}])
def test_experts_are_matrices_of_their_own(options: dict[str, object]) -> None:
    """Three steps of [E, R, C] are those of E matrices [R, C], bit for bit."""
    torch.manual_seed(0)
    start = torch.randn(3, 16, 32)
    together, apart = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    optimizers = [Muon([{"params": chosen, "muon": True}], 1e-2, (0.9, 0.95), 0.1, **options) for chosen in ([together], apart)]  # pyright: ignore
    for seed in range(3):
        torch.manual_seed(seed)
        together.grad = torch.randn_like(together)
        for parameter, gradient in zip(apart, together.grad.clone(), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        assert [optimizer.iterated for optimizer in optimizers] == [3, 3]
    assert torch.equal(together, torch.stack([p.detach() for p in apart])) and not torch.equal(together, start)


class Pair(nn.Module):
    """Two matrices of one shape, a tall one, and what is AdamW's."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.matrices = nn.ParameterList([torch.randn(6, 8), torch.randn(6, 8), torch.randn(9, 4)])
        self.gain = nn.Parameter(torch.randn(5))
        self.to(dtype)

    def optimizer(self, lr: float = 1e-2, weight_decay: float = 0.1, **options: object) -> Muon:
        groups = [{"params": list(self.matrices), "muon": True}, {"params": [self.gain]}]
        return Muon(groups, lr, (0.9, 0.95), weight_decay, **options)  # pyright: ignore[reportArgumentType]

    def give_gradients(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)


def test_steps_are_those_of_torchs_two_optimizers() -> None:
    """Five steps with weight decay equal torch's Muon, scaled to AdamW's length, on the matrices, up to bf16's rounding of the
    iteration, and torch's AdamW on the rest, exactly."""
    ours, theirs = Pair(), Pair()
    optimizer = ours.optimizer()
    muon = torch.optim.Muon(list(theirs.matrices), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([theirs.gain], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for seed in range(5):
        for pair in (ours, theirs):
            pair.give_gradients(seed)
        optimizer.step()
        muon.step()
        adamw.step()
        assert optimizer.iterated == 3
    assert torch.equal(ours.gain, theirs.gain)
    start = Pair()
    for a, b, first in zip(ours.matrices, theirs.matrices, start.matrices, strict=True):
        assert (a - b).norm() <= 0.02 * (b - first).norm()


def test_scales_are_torchs_two() -> None:
    """`rms` makes steps as long as AdamW's, `spectral` of spectral norm √max(1, R/C): torch's match_rms_adamw and original."""
    for ours, theirs in (("rms", "match_rms_adamw"), ("spectral", "original")):
        pair, other = Pair(), Pair()
        optimizer = pair.optimizer(weight_decay=0.0, scale=ours)
        muon = torch.optim.Muon(list(other.matrices), lr=1e-2, weight_decay=0.0, adjust_lr_fn=theirs)
        pair.give_gradients(1)
        other.give_gradients(1)
        optimizer.step()
        muon.step()
        for a, b, first in zip(pair.matrices, other.matrices, Pair().matrices, strict=True):
            assert (a - b).norm() <= 0.04 * (b - first).norm()


def test_normuon_evens_out_the_rows() -> None:
    """Three steps equal the definition in float64; as long as Muon's, rows equally long at first."""
    pair = Pair(dtype=torch.float64)
    optimizer = pair.optimizer(weight_decay=0.0, normuon=True, compute=torch.float64)
    moments = [torch.zeros(len(matrix), 1, dtype=torch.float64) for matrix in pair.matrices]
    momenta = [torch.zeros_like(matrix) for matrix in pair.matrices]
    for seed in range(3):
        pair.give_gradients(seed)
        before = [matrix.detach().clone() for matrix in pair.matrices]
        gradients = [matrix.grad.clone() for matrix in pair.matrices if matrix.grad is not None]
        optimizer.step()
        for i, matrix in enumerate(pair.matrices):
            momenta[i] = 0.95 * momenta[i] + gradients[i]
            update = naive(gradients[i] + 0.95 * momenta[i], "quintic")
            moments[i] = 0.95 * moments[i] + 0.05 * update.square().mean(dim=1, keepdim=True)
            update = update / (moments[i].sqrt() + 1e-8)
            update *= min(update.shape) ** 0.5 / update.norm()
            expected = before[i] - 1e-2 * 0.2 * max(update.shape) ** 0.5 * update
            assert (matrix - expected).norm() <= 1e-9
            if seed == 0:
                rows = (matrix - before[i]).norm(dim=1)
                assert rows.max() <= rows.min() * (1 + 1e-4)


def test_matrices_are_stepped_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few matrices are iterated at once, the step is the same."""
    whole, parts = Pair(), Pair()
    optimizers = whole.optimizer(), parts.optimizer()
    for seed in range(2):
        whole.give_gradients(seed)
        parts.give_gradients(seed)
        optimizers[0].step()
        with monkeypatch.context() as patch:
            patch.setattr("trilobit.train.muon.CHUNK_BYTES", {True: 1, False: 1})
            optimizers[1].step()
    assert optimizers[1].iterated == 3
    for a, b in zip(whole.matrices, parts.matrices, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_odd_shapes_are_refused() -> None:
    """What is no matrix, or an empty one, is never quietly given to AdamW."""
    for shape in [(3,), (2, 3, 4, 5), (0, 5), (2, 0, 4)]:
        with pytest.raises(ConfigError, match=rf"none of which may be empty; \({shape[0]},"):
            Muon([{"params": [nn.Parameter(torch.ones(shape))], "muon": True}], 1e-2, (0.9, 0.95))


def test_what_is_not_finite_is_held_back() -> None:
    """With found_inf at one no parameter changes, whatever the gradients; at zero, and for matrices without gradient, the
    others step."""
    pair = Pair()
    before = [p.clone() for p in pair.parameters()]
    optimizer = pair.optimizer()
    pair.give_gradients(0)
    assert pair.matrices[0].grad is not None
    pair.matrices[0].grad.fill_(float("nan"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), before, strict=True))
    pair = Pair()
    optimizer = pair.optimizer()
    pair.give_gradients(0)
    pair.matrices[1].grad = None
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(pair.parameters(), before, strict=True)] == [False, False, True, False]
    assert optimizer.iterated == 2


def test_nothing_for_muon_is_refused() -> None:
    """Groups without a matrix for Muon would be AdamW alone under another name."""
    with pytest.raises(ConfigError, match="no parameter was given to Muon"):
        Muon([{"params": [nn.Parameter(torch.ones(3))]}], 1e-2, (0.9, 0.95))


def test_a_step_without_a_matrix_is_an_error() -> None:
    """Gradients that reach none of Muon's matrices would be AdamW alone, step after step."""
    pair = Pair()
    optimizer = pair.optimizer()
    pair.give_gradients(0)
    for matrix in pair.matrices:
        matrix.grad = None
    with pytest.raises(RuntimeError, match="no matrix of Muon's has a gradient"):
        optimizer.step()
