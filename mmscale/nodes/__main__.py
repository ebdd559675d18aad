"""`python -m mmscale.nodes [options] CONFIG [key=value ...]`, started on every rank as `mmscale.train` is.

Exit codes: 0 the nodes are good, 88 one is not, 2 wrong configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmscale.config import load_run_config
from mmscale.errors import TopologyError
from mmscale.nodes.check import Check
from mmscale.nodes.limits import parse
from mmscale.world import read_world
from shards.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Check the nodes of the stage that the words name."""
    try:
        asked = parse(sys.argv[1:] if argv is None else argv)
        config = load_run_config(asked.words[0], asked.words[1:])
        return Check(asked, config, read_world()).run()
    except (ConfigError, TopologyError) as e:
        print(f"mmscale: error: {e}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
