"""What is read from a compiled program's text, by programs that were counted by hand."""

import re

import pytest

from fedrevive_jax.compute.hlo import Program

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
TEXT = f"""HloModule jit_step, is_scheduled=true

%fused (p.0: f32[8]) -> f32[8] {{
  %p.0 = f32[8]{{0}} parameter(0)
  ROOT %double = f32[8]{{0}} add(%p.0, %p.0), {CYCLES.format(999_999)}
}}

%inner_body (b.0: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %b.0 = (s32[], f32[8], s32[]) parameter(0)
  %b.1 = f32[8]{{0}} get-tuple-element(%b.0), index=1
  %work = f32[8]{{0}} fusion(%b.1), kind=kLoop, calls=%fused, {CYCLES.format(7)}
  ROOT %b.out = (s32[], f32[8], s32[]) tuple(%b.1, %work, %b.1)
}}

%inner_condition (c.0: (s32[], f32[8], s32[])) -> pred[] {{
  %c.0 = (s32[], f32[8], s32[]) parameter(0)
  %c.1 = s32[] get-tuple-element(%c.0), index=0
  %c.2 = s32[] get-tuple-element(%c.0), index=2
  ROOT %c.less = pred[] compare(%c.1, %c.2), direction=LT
}}

%outer_body (o.0: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %o.0 = (s32[], f32[8], s32[]) parameter(0)
  %o.1 = f32[8]{{0}} get-tuple-element(%o.0), index=1
  %o.limit = s32[] get-tuple-element(%o.0), index=2
  %o.zero = s32[] constant(0)
  %o.moved = s32[] copy(%o.limit)
  %o.tuple = (s32[], f32[8], s32[]) tuple(%o.zero, %o.1, %o.moved)
  %inner = (s32[], f32[8], s32[]) while(%o.tuple), condition=%inner_condition, body=%inner_body
  %o.2 = f32[8]{{0}} get-tuple-element(%inner), index=1
  %o.gather = f32[8]{{0}} all-gather(%o.2), dimensions={{0}}, {CYCLES.format(1)}
  ROOT %o.out = (s32[], f32[8], s32[]) tuple(%o.zero, %o.gather, %o.limit)
}}

%outer_condition (d.0: (s32[], f32[8], s32[])) -> pred[] {{
  %d.0 = (s32[], f32[8], s32[]) parameter(0)
  %d.1 = s32[] get-tuple-element(%d.0), index=0
  %d.five = s32[] constant(5)
  ROOT %d.less = pred[] compare(%d.1, %d.five), direction=LT
}}

%cheap (e.0: f32[8]) -> f32[8] {{
  %e.0 = f32[8]{{0}} parameter(0)
  ROOT %e.1 = f32[8]{{0}} negate(%e.0), {CYCLES.format(2)}
}}

%dear (f.0: f32[8]) -> f32[8] {{
  %f.0 = f32[8]{{0}} parameter(0)
  ROOT %f.1 = f32[8]{{0}} negate(%f.0), {CYCLES.format(1000)}
}}

ENTRY %main (a.0: f32[8], a.1: pred[]) -> f32[8] {{
  %a.0 = f32[8]{{0}} parameter(0)
  %a.1 = pred[] parameter(1)
  %three = s32[] constant(3)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8], s32[]) tuple(%zero, %a.0, %three)
  %outer = (s32[], f32[8], s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  %g = f32[8]{{0}} get-tuple-element(%outer), index=1
  %named = f32[8]{{0}} conditional(%a.1, %g, %g), branch_computations={{%cheap, %dear}}, \
metadata={{op_name="jit(step)/distillation/cond"}}
  ROOT %plain = f32[8]{{0}} conditional(%a.1, %named, %named), true_computation=%cheap, \
false_computation=%dear, metadata={{op_name="jit(step)/cond"}}
}}
"""


def test_loops_and_branches_are_counted():
    """Five rounds of (three rounds of 7, and 1); the dearer branch, apart where it has a name.

    The inner loop's limit comes from outside the outer one. What a fusion holds is not counted
    again.
    """
    cost = Program(TEXT).cost(("distillation", "synthesis"))
    assert cost.always == 5 * (3 * 7 + 1) + 1000
    assert cost.branches == {"distillation": 1000, "synthesis": 0}
    assert cost.unknown_loops == 0


@pytest.mark.parametrize(
    ("old", "new", "always", "unknown"),
    [
        ("%d.five = s32[] constant(5)", "%d.five = s32[] negate(%d.1)", 3 * 7 + 1, 1),
        ("compare(%d.1, %d.five), direction=LT", "compare(%d.1, %d.five), direction=NE", 22, 1),
        ("%zero = s32[] constant(0)", "%zero = s32[] constant(1)", 4 * (3 * 7 + 1), 0),
    ],
)
def test_a_loop_of_unknown_length_is_counted_once_and_told(old, new, always, unknown):
    assert old in TEXT
    cost = Program(TEXT.replace(old, new)).cost()
    assert (cost.always, cost.unknown_loops) == (always + 2 * 1000, unknown)


def test_a_known_length_is_taken():
    known = re.sub(
        r"body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"9"}}', TEXT
    )
    assert Program(known).cost().always == 9 * 22 + 2000


def test_collectives_are_counted_by_kind():
    text = (
        TEXT
        + "\n%x (y: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n"
        + "".join(
            f"  %z{i} = f32[8]{{0}} collective-permute-{part}(%y)\n"
            for i, part in enumerate(("start", "done"))
        )
        + "}\n"
    )
    assert Program(text).collectives() == {"all-gather": 1, "collective-permute": 1}
