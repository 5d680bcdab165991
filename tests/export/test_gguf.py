"""GGUF files: stock llama.cpp runs them as the model they were made from, or there is none; what no graph holds is refused."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import torch

from export.ggufs import frozen, stored, windows
from families import build
from trilobit.errors import ExportError, VerificationError
from trilobit.export import gguf, gguf_blocks, llama_cpp
from trilobit.export.check import activations
from trilobit.export.check_llama_cpp import check_llama_cpp
from trilobit.export.source import Source, StoredSource
from trilobit.export.verify import Agreement
from trilobit.formats import Q2_0
from trilobit.surgery.ternary import TernarySpec, ternarize

pytestmark = pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
WEIGHTS_ONLY = {"placement": "none", "activations": "none", "scale": "group-64"}
TIED = {"tie_word_embeddings": True}


def written(folder: Path, kind: str = "auto", head: str = "auto", **model: Any) -> tuple[Path, gguf.Contents]:
    source = StoredSource(stored(folder / "model", **model))
    return folder / "m.gguf", gguf.write(source, folder / "m.gguf", kind, head)


def reading(folder: Path, int8: bool, **options: Any) -> tuple[Agreement, gguf.Contents]:
    """How llama.cpp agrees with the model, its activations quantised or not."""
    file, contents = written(folder, **options)
    read = llama_cpp.read(file, windows(), [], "", top=512, threads=1)
    with activations(frozen(folder / "model").model, int8) as model:
        return llama_cpp.compare_reading(model, read, windows()), contents


@pytest.mark.parametrize(
    ("graph", "model"),
    {
        "llama": {"placement": "none"},
        "llama with Llama 3's positions": {
            "placement": "none",
            "settings": {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
                }
            },
        },
        "llama with every bias": {
            "placement": "none", "dead_zone_bias": 0.1, "settings": {"attention_bias": True, "mlp_bias": True},
        },
        "qwen2 with biases": {"family": "qwen2", "placement": "none"},
        "qwen3 with q/k norms": {"family": "qwen3", "placement": "none", "settings": {"head_dim": 64}},
        "gemma3": {"family": "gemma3_text", "placement": "none"},
        "bitnet": {"placement": "output", "settings": {**TIED, "rms_norm_eps": 1e-3}},
        "bitnet of single scales": {"placement": "every", "gain": "scalar", "settings": TIED, "constant_gains": True},
        "llama, ordinary": {},
    }.items(),
)  # fmt: skip
def test_each_graph_holds_its_models_exactly(graph: str, model: dict[str, Any], tmp_path: Path) -> None:
    """With weights stored in full, llama.cpp's next-token probabilities are the model's (activations not quantised): gains,
    biases, norms, positions, two epsilons, heads, and negative scales are all where the graph looks for them."""
    agreement, contents = reading(tmp_path, False, kind="f32", head="f32", **model)
    assert contents.graph == graph.split(",")[0].split()[0]
    assert agreement.top1 > 0.96
    assert agreement.kl < 1e-4


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("tq1_0", {"placement": "none", "scale": "group-256"}),
        ("tq2_0", {"placement": "output", "settings": TIED}),
        ("q2_0", WEIGHTS_ONLY),
        ("q2_0", {"placement": "none", "scale": "row", "cover": "+embeddings"}),
    ],
)
def test_ternary_types(kind: str, model: dict[str, Any], tmp_path: Path) -> None:
    """Blocks hold the codes and scales of the model, and llama.cpp is no further off than its own int8 rounding."""
    agreement, contents = reading(tmp_path, False, kind=kind, **model)
    assert contents.kind == kind
    assert agreement.kl < 0.05
    layout, source = gguf.TERNARY[kind], StoredSource(tmp_path / "model")
    path = "model.layers.1.mlp.down_proj"
    entry = next(e for e in contents.entries if e.name == "blk.1.ffn_down.weight")
    codes, scales = layout.unpack(torch.from_numpy(entry.read()))
    packed = source.packed(path)
    assert torch.equal(codes, packed.codes)
    wanted = packed.scale
    if wanted.shape[1] > 1:
        wanted = wanted.repeat_interleave(512 // wanted.shape[1], dim=1)
    spread = scales.float().repeat_interleave(layout.BLOCK, dim=1)
    assert torch.equal(spread, wanted.half().float().expand_as(spread))


@pytest.mark.parametrize("kind", ["q6_k", "q8_0"])
def test_heads_are_the_gguf_packages(kind: str) -> None:
    """Blocks of the head's types are read by the gguf package within two steps of what was stored, most of them much nearer."""
    values = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    values[1, :16] = 0
    block, size, number = gguf_blocks.KINDS[kind]
    data = gguf_blocks.encode(values, kind)
    assert data.nbytes == values.numel() // block * size
    back = torch.from_numpy(package.quants.dequantize(data, package.GGMLQuantizationType(number)))
    assert (back - values).norm() < 0.02 * values.norm()
    steps = values.reshape(3, -1, 16).abs().amax(-1).repeat_interleave(16, dim=1).reshape(3, -1) / 31
    assert ((back - values).abs() <= 2 * steps).all()
    assert back[1, :16].abs().max() == 0


def test_q8_0_has_the_gguf_packages_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, halves, zeros, tiny and large numbers among them, also where it is made in several pieces."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 96, generator=generator) * 10.0 ** torch.randint(-6, 4, (300, 1), generator=generator)
    values[::3] = torch.randint(-254, 255, (100, 96), generator=generator) / 2
    values[7], values[8, :32] = 0, 1e-30
    for chunk in (gguf_blocks.CHUNK, 64):
        monkeypatch.setattr(gguf_blocks, "CHUNK", chunk)
        theirs = package.quants.quantize(values.numpy(), package.GGMLQuantizationType.Q8_0)
        assert gguf_blocks.encode(values, "q8_0").tobytes() == theirs.tobytes()


FAULTS = ("scale inverted", "rows not permuted", "norm dropped", "gain forgotten", "codes shifted")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that gets scale, order of rows, norms, gains or codes wrong is found out by the check that export makes."""
    model: dict[str, Any] = {"placement": "none"}
    if fault == "rows not permuted":
        monkeypatch.setattr(gguf, "_row_order", lambda *_: None)
    elif fault == "scale inverted":
        right = gguf.adjustments
        paths = {f"model.layers.{i}.mlp.down_proj": 9.0 for i in range(2)}
        monkeypatch.setattr(gguf, "adjustments", lambda *a: gguf.Adjustments(right(*a).eps, scales=paths))
    elif fault in ("norm dropped", "gain forgotten"):
        model = {"placement": "output", "settings": TIED}
        wanted = "ffn_norm" if fault == "gain forgotten" else "attn_sub_norm"
        encode = gguf._f32
        names: list[str] = []
        monkeypatch.setattr(gguf, "_f32", lambda t: encode(torch.ones_like(t) if names and wanted in names[-1] else t))

        class Noting(gguf.Entry):
            def __getattribute__(self, name: str) -> Any:
                if name == "read":
                    names.append(object.__getattribute__(self, "name"))
                return object.__getattribute__(self, name)

        monkeypatch.setattr(gguf, "Entry", Noting)
    else:
        shift = Q2_0.pack
        monkeypatch.setattr(Q2_0, "pack", classmethod(lambda cls, codes, scales: shift(codes.roll(1, dims=1), scales)))
    file, _ = written(tmp_path, "q2_0" if fault == "codes shifted" else "f32", "f16", **model)
    with pytest.raises(VerificationError, match=r"llama\.cpp reads another model"):
        check_llama_cpp(frozen(tmp_path / "model"), file, windows(2))


@pytest.mark.interpreter
def test_the_check_ranks_a_thousand_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL is taken over a thousand tokens and the rest (it was over as many as the continuation has), and
    both continuations of the prompt are there to be read."""
    found: list[llama_cpp.Reading] = []
    right = llama_cpp.read

    def noting(*arguments: Any, **options: Any) -> llama_cpp.Reading:
        found.append(right(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(llama_cpp, "read", noting)
    file, _ = written(tmp_path, "f32", "f16", placement="none")
    check = check_llama_cpp(frozen(tmp_path / "model"), file, windows())
    assert found[0].ids.shape == (32, llama_cpp.TOP) == (32, 1024)
    assert check.theirs[:4] == check.ours[:4] != ""


@pytest.mark.parametrize("spread", [0.02, 0.002])
@pytest.mark.parametrize("wrong", [False, True])
def test_models_that_hardly_say_anything(spread: float, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where int8 activations cost next to nothing an 8-bit head costs more: it belongs to what is allowed (old code: right
    files were refused), and no constant does, which a fault could hide behind (two matrices nine times too large)."""
    if wrong:
        right, paths = gguf.adjustments, {f"model.layers.{i}.mlp.down_proj": 9.0 for i in range(2)}
        monkeypatch.setattr(gguf, "adjustments", lambda *a: gguf.Adjustments(right(*a).eps, scales=paths))
    file, _ = written(tmp_path, "f32" if wrong else "auto", "auto", placement="none", settings={"initializer_range": spread})
    with pytest.raises(VerificationError, match="another model") if wrong else nullcontext():
        llama, int8 = check_llama_cpp(frozen(tmp_path / "model"), file, windows(2)).rows
        assert int8.against == "the model, none quantised, head q8_0"
        assert llama.agreement.kl < 2 * int8.agreement.kl < 1e-4


def test_what_no_graph_holds_is_refused(tmp_path: Path) -> None:
    """Each refusal says why and what can hold the model, and names the flag."""
    for index, (model, kind, head, words) in enumerate(
        (
            ({"placement": "every", "settings": TIED}, "auto", "auto", "gain per channel .*--placement output.*--to native"),
            ({"placement": "every", "gain": "scalar", "settings": TIED}, "auto", "auto", "input_layernorm has not"),
            ({"placement": "output"}, "auto", "auto", "its head is the embedding"),
            ({"family": "qwen2", "placement": "output", "settings": TIED}, "auto", "auto", "no biases"),
            ({"family": "qwen3", "placement": "output", "settings": TIED}, "auto", "auto", "further norms of Qwen3"),
            ({"family": "olmo2", "placement": "none"}, "auto", "auto", "no llama.cpp graph is known here for Olmo2"),
            (WEIGHTS_ONLY, "tq2_0", "auto", "--type tq2_0 .*256 columns and one scale.*q2_0"),
            ({"placement": "none", "settings": {"hidden_size": 192}}, "tq1_0", "auto", "has 192, not a multiple.*q2_0"),
            ({"placement": "none", "settings": {"hidden_size": 192}}, "auto", "q6_k", "--head q6_k has blocks of 256"),
            ({}, "q2_0", "auto", "--type q2_0 holds ternary weights, and this model is not ternary"),
            ({"placement": "none", "settings": {"hidden_act": "relu2"}}, "auto", "auto", "its gate is silu"),
            ({"family": "mistral", "placement": "none", "settings": {"sliding_window": 8}}, "auto", "auto", "a window of them"),
        )
    ):  # fmt: skip
        source = StoredSource(stored(tmp_path / str(index), **model))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ExportError, match=words):
            gguf.plan_file(source, kind, head)


BIASED = {"placement": "none", "dead_zone_bias": 0.1}
GEMMA: dict[str, Any] = {"num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8}


@pytest.mark.parametrize(
    ("family", "settings", "spec", "words"),
    [
        (
            "qwen2",
            {},
            BIASED,
            r"biases only at q_proj, k_proj, v_proj, and model.layers.0.self_attn.o_proj has one \(--dead-zone",
        ),
        ("qwen3", {}, BIASED, "no biases, and .*q_proj has one"),
        ("qwen3", {"attention_bias": True}, {}, "no biases, and .*q_proj has one"),
        ("gemma3_text", GEMMA, BIASED, "no biases, and .*q_proj has one"),
        ("gemma3_text", GEMMA | {"attention_bias": True}, {}, "no biases, and .*q_proj has one. Use"),
        ("gemma3_text", GEMMA | {"final_logit_softcapping": 30.0}, {}, "no final_logit_softcapping, this model one of 30"),
        ("llama", {}, BIASED | {"cover": "+embeddings"}, "and lm_head has one"),
    ],
)
def test_biases_and_caps_that_a_graph_has_not_are_refused(
    family: str, settings: dict[str, Any], spec: dict[str, Any], words: str
) -> None:
    """llama.cpp would not load such a file, or run it as another model (they were written)."""
    model = build(family, **settings)
    plan = ternarize(model, TernarySpec(**spec)).plan if spec else None
    with pytest.raises(ExportError, match=words):
        gguf.plan_file(Source(model, plan), "auto", "auto")


def test_a_file_that_llama_cpp_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    """What llama.cpp says of a broken file is what the user is told."""
    file, _ = written(tmp_path, placement="none")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(VerificationError, match=r"llama\.cpp cannot run what was written: .*It was not left behind"):
        llama_cpp.read(file, windows(), [], "")
