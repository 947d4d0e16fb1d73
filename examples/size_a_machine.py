"""How much memory does Flash take at a context, and what bounds its speed? Counted by the real
graph, on shapes.

python examples/size_a_machine.py
"""

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.planning.plan import Hardware, Plan


def main():
    print("Flash, one sequence, eight devices; rates are ceilings of the data sheet")
    for context in (8_192, 131_072, 1_048_576):
        plan = Plan(PRESETS["flash"], context, Hardware.parse("h200x8"), Place(tp=4, ep=2))
        _, why = plan.verdict
        speed = plan.ceiling("decode")
        print(f"{context:>9} tokens: {speed.tokens_per_second:.0f} tokens/s, bound by {speed.limit}; {why}")


if __name__ == "__main__":
    main()
