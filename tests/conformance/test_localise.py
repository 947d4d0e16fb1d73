"""Localising: faults of the museum, planted in one layer of the embedded model, are named with
their op and layer.
"""

import functools
import re

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.check import Session
from dsv4_conformance.cli.localise import command
from dsv4_conformance.model import golden, localise, trace_file
from dsv4_conformance.model.record import Recorder, record
from dsv4_conformance.museum import hunt
from dsv4_conformance.museum.fault import MUTANTS
from dsv4_conformance.run import catalogue, runner
from recorded import vectors

from dsv4_core.checkpoint.weights import Checkpoint

CHECKPOINT = Checkpoint(golden.checkpoint_path("tiny-jargon"))
TOKENS, DECODE = 68, 2  # past a window of 64, so that the ring wraps


def planted(mutant, place):
    """A backend with a mutant's fault in it while one layer runs, and right elsewhere."""
    right = hunt.right_backend()
    wrong = MUTANTS[mutant].build(right)

    def either(name):
        @functools.wraps(getattr(right, name))
        def method(self, *operands, **scalars):
            return getattr(wrong if self.recorder.place == place else right, name)(self, *operands, **scalars)

        return method

    names = [n for n, value in vars(wrong).items() if callable(value)]
    return type("Planted", (right,), {n: either(n) for n in names})(numerics="native")


def run(backend, *, tokens=TOKENS, keep=lambda _time, _place: True):
    recorder = backend.recorder = Recorder(backend, keep)
    return record(CHECKPOINT, recorder, vectors("tiny-jargon", "golden")["prompt"][:1, :tokens], DECODE)


def first_over(calls, session):
    judged = localise.judge_all(calls, session)
    return judged, next((j for j in judged if not j.ok), None)


PLANTED = {  # mutant: layer, ops any of which names it
    "sink_missing": (1, {"sparse_attn"}),
    "half_split_rope": (3, {"apply_rope"}),
    "unweighted_q_norm_missing": (2, {"rms_norm"}),
    "overlap_halves_swapped": (4, {"compress"}),
    "indexer_relu_missing": (2, {"index_scores"}),
    "hadamard_not_normalised": (4, {"hadamard"}),
    "routing_weight_after_w2": (3, {"moe"}),
    "weights_not_scaled": (1, {"gate"}),
    "hash_table_ignored": (0, {"gate_hash"}),
    "last_expert_dropped": (5, {"expert_linear", "combine"}),
    "comb_not_transposed": (2, {"hc_post"}),
    "sinkhorn_one_iteration_short": (4, {"hc_split_sinkhorn"}),
    "ring_wrap_wrong": (1, {"cache_write"}),
    "wo_a_quantised": (2, {"grouped_linear"}),
    "truncated_norm": (3, {"rms_norm"}),
}


ORDINARY = ("sink_missing", "overlap_halves_swapped", "comb_not_transposed")  # the others take minutes together


@pytest.mark.parametrize("mutant", [m if m in ORDINARY else pytest.param(m, marks=pytest.mark.proof) for m in PLANTED])
def test_a_fault_in_one_layer_is_named_with_op_and_layer(mutant):
    layer, ops = PLANTED[mutant]
    backend = planted(mutant, f"layer{layer}")
    calls = run(backend, keep=lambda _, place: place in {f"layer{layer}", f"layer{(layer + 1) % 6}"})
    _, first = first_over(calls, Session(backend))
    assert first is not None, "nothing is over budget"
    assert (first.recorded.place, first.recorded.call.op in ops) == (f"layer{layer}", True), first.recorded.name


def test_right_backends_are_within_budget_everywhere(tmp_path):
    """Also at decode, and in the layers before and after: no false alarm on trained activations."""
    done = CliRunner().invoke(command, ["--backend", "reference", "--tokens", "12", "--cases", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert re.search(r"\d+ calls, all within budget; nearest: ", done.output)


def test_what_is_over_budget_is_named_and_saved_as_a_case_that_replays(tmp_path):
    wrong = planted("comb_not_transposed", "layer2")
    calls = run(wrong, tokens=10, keep=lambda _, place: place in {"layer1", "layer2"})
    judged, _ = first_over(calls, Session(wrong))
    lines = localise.report(judged, ("planted", ""))
    assert re.fullmatch(
        r"first over budget: op hc_post, layer2, prefill, position \d  \(prefill.layer2.hc_post\)", lines[0]
    )
    assert re.search(
        r"planted: \d+ of \d+ elements over budget; worst \[.*\]: got .*, want .*, off by .*, budget ", lines[1]
    )
    assert any(line.startswith("  OVER hc_post: planted ") for line in lines)
    (path,) = localise.save_findings(judged, tmp_path, "native")
    right = hunt.right_backend()
    everywhere_wrong = MUTANTS["comb_not_transposed"].build(right)
    for cls, status in ((right, "passed"), (everywhere_wrong, "failed")):
        result = runner.run(Session(cls(numerics="native")), cases=[str(path)])
        assert [f.status for f in result.findings] == [status]
    with pytest.raises(ValueError, match="recorded in native; run it with --numerics native"):
        catalogue.find(str(path)).run(Session(right(numerics="float32")))


def test_a_trace_is_judged_elsewhere(tmp_path):
    wrong = planted("sink_missing", "layer1")
    packed = trace_file.pack(
        run(wrong, tokens=10, keep=lambda _, place: place in {"layer0", "layer1"}), "native", CHECKPOINT.identity()
    )
    trace_file.write(packed, tmp_path)
    session = Session(hunt.right_backend()(numerics="native"))
    calls = trace_file.read(tmp_path, "native")
    judged = localise.judge_all(calls, session, again=True)
    first = next(j for j in judged if not j.ok)
    assert first.recorded.name == "prefill.layer1.sparse_attn"
    assert first.verdict.ok  # the backend that judges computes it rightly from the same inputs
    assert "  here: within budget" in localise.report(judged, ("here", "trace"))[1]
    with pytest.raises(ValueError, match="recorded in native"):
        trace_file.read(tmp_path, "float32")


def test_dumped_traces_name_tensors_as_the_recorded_ones_do(tmp_path):
    options = [
        "--backend",
        "reference",
        "--tokens",
        "10",
        "--decode",
        "2",
        "--layers",
        "2",
        "--positions",
        "9",
        "--dump",
        str(tmp_path),
    ]
    done = CliRunner().invoke(command, options)
    assert re.match(r"\d+ calls, \d+ tensors, \d+\.\d MB -> ", done.output)
    from dsv4_core.checkpoint.shards import Shard

    names = set(Shard(tmp_path / trace_file.TENSORS).entries)
    assert {
        "decode9.layer2.sparse_attn.q",
        "decode9.layer2.sparse_attn.topk_idxs",
        "decode9.layer2.sparse_attn.out",
    } <= names
    assert {n.split(".")[1] for n in names if n.startswith("decode")} == {"embedding", "layer2", "head"}
    assert not any(n.startswith(("prefill", "decode8")) for n in names)
    again = CliRunner().invoke(
        command, ["--backend", "reference", "--trace", str(tmp_path), "--cases", str(tmp_path / "cases")]
    )
    assert again.exit_code == 0, again.output


def test_tokens_may_be_a_file(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(6)[None])
    assert localise.text_of(str(tmp_path / "ids.npy"), CHECKPOINT.config).tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"neither a number nor a \.npy file"):
        localise.text_of(str(tmp_path / "none"), CHECKPOINT.config)
    assert [n for n in range(8) if localise.ranges("0,2-4")(n)] == [0, 2, 3, 4]


def test_a_run_that_ends_early_is_judged_so_far_and_says_where_it_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(hunt.right_backend(), "hc_pre", lambda *_, **__: None)
    done = CliRunner().invoke(command, ["--backend", "reference", "--tokens", "10", "--cases", str(tmp_path)])
    assert done.exit_code == 1
    assert (
        "the run ended there: op hc_pre, layer0, prefill: raised TypeError: returned None; the contract" in done.output
    )


@pytest.mark.parametrize(("option", "message"), [("--layers", "layers 0 to 5"), ("--positions", "positions 0 to 9")])
def test_what_the_run_has_not_is_said(option, message, tmp_path):
    done = CliRunner().invoke(command, ["--tokens", "10", option, "99", "--cases", str(tmp_path)])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
