"""ZB-V's bubble at stages of two lengths: what of it is the schedule's?

What comes between two sleeps (Python, messages, four processes on two cores) does not grow with
them; a bubble of the schedule would keep its share of a step. So the shares at F = 100 ms and at
F = 200 ms, beside 1F1B's and torch's, tell the two apart. See `pipe_bubble` for what is measured.
"""

from __future__ import annotations

from common import finish, parser
from pipe_bubble import Heat, run_heat
from pipe_sleep import Times


def main() -> int:
    """Run the bench; see the module docstring."""
    args = parser(__doc__ or "", out="pipe_zero_bubble").parse_args()
    lengths = (0.05,) if args.quick else (0.1, 0.2)
    rounds = 1 if args.quick else 3
    systems = [name for name in ("torch", "ours") if not args.only or name in args.only.split(",")]
    rows = [
        row
        for seconds in lengths
        for row in run_heat(
            Heat(4, 16, ("1f1b", "zb_v"), Times(*[seconds] * 3), rounds=rounds, steps=1), systems
        )
    ]
    return finish(rows, args, complete=len(systems) == 2)


if __name__ == "__main__":
    raise SystemExit(main())
