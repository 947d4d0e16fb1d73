import json
from collections import Counter
from dataclasses import replace

import pytest
from click.testing import CliRunner

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.layout import parameters
from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.cli import root
from dsv4_core.contract.registry import backend_class
from dsv4_core.graph.cache import Cache
from dsv4_core.planning.claims import MILLION, Predecessor, claims
from dsv4_core.planning.counting import Planner, total
from dsv4_core.planning.plan import Graph, Hardware, Plan
from dsv4_core.planning.shapes import LayeredModel, Recorder, ShapeArray, ShapeSource, run_step

FLASH, PRO, TINY = PRESETS["flash"], PRESETS["pro"], PRESETS["tiny"]
H100X8 = Hardware.parse("h100x8")


def test_published_claims_hold():
    found = {c.what: c for c in claims()}
    assert all(c.holds for c in found.values()), found
    assert found["pro: FLOPs of V3.2's, 1M"].ours == pytest.approx(
        27.5, abs=0.1
    )  # as the graph was when this was written
    assert found["flash: KV cache of V3.2's, 1M"].ours == pytest.approx(7.3, abs=0.1)


@pytest.mark.parametrize(
    ("name", "weights", "read_128k", "read_1m", "stored_1m"),
    [("flash", 11.2e9, 68e6, 480e6, 3.7e9), ("pro", 39.7e9, 108e6, 706e6, 5.3e9)],
)
def test_decode_limits_are_those_worked_out_by_hand(name, weights, read_128k, read_1m, stored_1m):
    graph = Graph(PRESETS[name])
    step = graph.decode(1, MILLION)
    assert step.weights == pytest.approx(weights, rel=0.02)
    assert step.read["cache"] == pytest.approx(read_1m, rel=0.02)
    assert graph.decode(1, 1 << 17).read["cache"] == pytest.approx(read_128k, rel=0.02)
    assert graph.cache_bytes(MILLION) == pytest.approx(stored_1m, rel=0.02)


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_a_token_multiplies_with_every_active_parameter_once(config):
    """Two operations for each active parameter, less what is no matrix product: norms, biases,
    sinks, positional tables, mHC's scales.
    """
    work = total(Graph(config).step(1, 1, 0)).work
    rows = config.num_attention_heads * config.head_dim * 4  # attention over the one row there is: keys and values
    assert sum(n for kind, n in work.items() if kind != "vector") - rows * config.num_hidden_layers == pytest.approx(
        2 * parameters(config).active, rel=0.02
    )


def test_the_indexer_alone_grows_with_context_beyond_its_top_k():
    """From 128K to 1M: FP4 work by the keys, BF16 work by the rows of ratio 128, FP8 work not at
    all.
    """
    near, far = (Graph(FLASH).decode(1, n).work for n in (1 << 17, 1 << 20))
    keys = (MILLION - (1 << 17)) / 4 * 2 * FLASH.index_n_heads * FLASH.index_head_dim
    rows = (MILLION - (1 << 17)) / 128 * 4 * FLASH.num_attention_heads * FLASH.head_dim
    assert far["fp4"] - near["fp4"] == pytest.approx(keys * FLASH.compress_ratios.count(4), rel=1e-3)
    assert far["bfloat16"] - near["bfloat16"] == pytest.approx(rows * FLASH.compress_ratios.count(128), rel=1e-3)
    assert far["fp8"] == pytest.approx(near["fp8"], rel=1e-3)


def test_whole_fused_ops_read_the_same_weights_and_fewer_activations():
    whole, composed = (total(Graph(FLASH, like=like).step(1, 64, 4096)) for like in (None, backend_class("reference")))
    assert whole.work == pytest.approx(composed.work)
    assert whole.weights == pytest.approx(composed.weights)
    assert whole.read["activation"] < composed.read["activation"]


def test_live_memory_is_what_is_referred_to():
    planner = Planner()
    x = planner.array([4, 8], "bfloat16")
    view = x.reshape((32,))[3:5]
    del x
    assert planner.live["activation"] == 64
    del view
    assert planner.live["activation"] == 0
    y = planner.hc_expand(planner.array([2, 8], "bfloat16"), hc=4)
    assert (planner.live["activation"], planner.peak["activation"]) == (128, 160)
    del y


def test_cache_is_counted_as_it_is_allocated():
    for numerics in ("native", "float32", "float64"):
        planner = Planner(numerics=numerics)
        real = Cache(backend_class("reference")(numerics=numerics), TINY, 3, 1000)
        assert Cache(planner, TINY, 3, 1000).nbytes == planner.live["cache"] == real.nbytes


def test_ranks_share_all_weights_and_all_products():
    place = Place(4, 2)
    alone, rank = Graph(FLASH), Graph(FLASH, place)
    assert rank.source.stored()["experts"] == alone.source.stored()["experts"] / 8
    one, shared = (total(g.step(b, 1, 8192)) for g, b in ((alone, 2), (rank, 1)))
    assert shared.work["fp8 x fp4"] == pytest.approx(one.work["fp8 x fp4"] / 8)
    assert 8 * shared.read["experts"] == pytest.approx(one.read["experts"])
    attention = one.work["bfloat16"] / 8
    assert attention < shared.work["bfloat16"] < 2 * attention  # what every head reads is computed on each rank


def test_bytes_sent_are_the_exchange_s():
    place, tokens = Place(1, 4), 3
    sent = total(Graph(FLASH, place).step(tokens, 1, 100)).sent
    copies = tokens * FLASH.num_experts_per_tok * 3 / 4 * FLASH.num_hidden_layers
    assert sent["dispatch"] == pytest.approx(copies * (4096 + 32 + 4))
    assert sent["combine"] == pytest.approx(copies * 8192)
    assert not total(Graph(FLASH).step(1, 1, 100)).sent


def test_prefill_in_chunks_adds_up_to_every_chunk():
    plan = Plan(TINY, 4096, replace(H100X8, devices=1), Place(), chunk=256)
    every = sum(plan.graph.prefill(start, 256).equivalent for start in range(0, 4096, 256))
    assert plan.prefill.equivalent == pytest.approx(every, rel=0.01)


def test_verdicts():
    fits, why = Plan(FLASH, 1 << 16, H100X8, Place(8)).verdict
    assert fits, why
    fits, why = Plan(PRO, 1 << 16, H100X8, Place(8)).verdict
    assert not fits
    assert "weights alone are" in why
    plan = Plan(FLASH, MILLION, H100X8, Place(8), batch=100)
    assert not plan.verdict[0]
    assert replace(plan, batch=plan.sequences).verdict[0]
    assert not replace(plan, batch=plan.sequences + 1).verdict[0]


def test_hardware_lacking_a_format_uses_the_next_wider_one(tmp_path):
    assert (
        H100X8.speed("fp4") == H100X8.speed("fp8 x fp4") == H100X8.speed("fp8") == 2 * H100X8.speed("bfloat16") + 1e12
    )
    assert Hardware.parse("910Cx8").speed("fp8") == Hardware.parse("910Cx8").speed("bfloat16")
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps(
            {"memory_gb": 1, "bandwidth_gbs": 2, "link_gbs": 3, "tflops": {"bfloat16": 4, "vector": 1}, "devices": 5}
        )
    )
    mine = Hardware.parse(str(file))
    assert (mine.devices, mine.memory, mine.link) == (5, 1e9, 3e9)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json has no `memory_gb`; an entry has memory_gb, bandwidth_gbs"):
        Hardware.parse(str(file))


@pytest.mark.parametrize("text", ["h100", "h100x-1", "h100xx8", "z80x8"])
def test_unknown_hardware_is_named(text):
    with pytest.raises(ValueError, match=f"hardware '{text}': write a file, or one of h100"):
        Hardware.parse(text)


def test_command_line_prints_tables_and_json():
    asked = "plan -m flash --context 8K --hardware h100x8 --tp 8 --price 16 --json"
    run = CliRunner().invoke(root, asked.split())
    assert run.exit_code == 0, run.output
    report = json.loads(run.output)["result"]
    assert report["fits"]
    assert (report["tp"], report["ep"]) == (8, 1)
    assert report["ceilings"]["decode"]["limit"] == "memory bandwidth"
    dollars = 16 / 3600 / report["ceilings"]["decode"]["tokens_per_second"] * 1e6
    assert report["ceilings"]["decode"]["dollars_per_million_tokens"] == pytest.approx(dollars)
    assert [g["context"] for g in report["growth"]] == [1 << i for i in range(12, 21)]
    run = CliRunner().invoke(root, ["plan", "--claims"])
    assert run.exit_code == 0
    assert "differs" not in run.output


def test_the_predecessor_is_its_published_figures():
    assert Predecessor().cache_bytes(1) == 61 * (656 + 132)
    assert Predecessor().equivalent(MILLION) == pytest.approx(1.19e12, rel=0.01)


def test_a_step_on_shapes_reads_no_host_value():
    planner = Planner()
    run_step(LayeredModel(ShapeSource(TINY), planner), batch=2, seq=3, start=130, mtp=True)
    assert {entry.layer for entry in planner.notes} == {None, *range(TINY.layers)}
    assert isinstance(planner.zeros((1,), "uint8"), ShapeArray)


class EveryLayer(LayeredModel):
    """Runs each layer, equal ones too."""

    def block(self, block, h, step):
        self._seen.clear()
        return super().block(block, h, step)


@pytest.mark.parametrize(
    ("batch", "seq", "start", "mtp"), [(1, 1, 255, False), (3, 1, 130, True), (2, 96, 0, True), (1, 512, 4096, False)]
)
def test_layers_of_equal_shapes_are_run_once_and_counted_each(batch, seq, start, mtp):
    """Counts, calls and the memory of the peak are those of a model that runs them all."""
    seen = []
    for kind in (LayeredModel, EveryLayer):
        planner, recorder = Planner(topk=6, sharing=2, groups=2), Recorder(like=backend_class("reference"))
        for be in (planner, recorder):
            run_step(kind(ShapeSource(FLASH), be), batch=batch, seq=seq, start=start, mtp=mtp)
        seen.append((planner.notes, planner.peak, recorder.notes))
    assert seen[0] == seen[1]
    assert len({entry.layer for entry in seen[0][0]}) == FLASH.num_hidden_layers + 1 + mtp


def test_equal_layers_are_really_run_once():
    runs = Counter()

    class Counted(Planner):
        def run(self, spec, values):
            runs[self.layer] += 1
            return super().run(spec, values)

    run_step(LayeredModel(ShapeSource(PRO), Counted()), batch=1, seq=1, start=4095)
    assert len(runs) <= 10 < PRO.num_hidden_layers


@pytest.mark.parametrize("text", ["h100x0", "h100x4097", "h100x4294967296"])
def test_a_machine_of_no_or_countless_devices_is_refused(text):
    with pytest.raises(ValueError, match=f"hardware '{text}': .* devices; a plan takes 1 to 4096"):
        Hardware.parse(text)
