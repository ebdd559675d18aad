"""`mmscale preflight`: runs the checks and prints a table, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from launcher.machine import this_machine
from launcher.plan import LaunchRequest
from launcher.preflight import examine
from launcher.preflight_hosts import examine_hosts, host_paths
from launcher.start import plan_here
from mmscale.config import load_run_config
from mmscale.data_config import training_places
from mmscale.finding import ORDER, Finding, render
from shards.errors import ConfigError
from shards.store.place import is_url


def preflight(request: LaunchRequest, master_port: int | None = None, *, as_json: bool = False) -> int:
    """Look at all that a launch needs.

    Returns:
        1 when something would fail, else 0.
    """
    findings = sorted(find(request, master_port), key=lambda finding: ORDER.index(finding.level))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(render(findings))
    return int(any(finding.level == "fail" for finding in findings))


def find(request: LaunchRequest, master_port: int | None = None) -> list[Finding]:
    """Look at all that a launch needs: the configuration, what this machine sees, the hosts."""
    try:
        plan, config = plan_here(request, master_port), load_run_config(request.arguments[0], request.arguments[1:])
    except ConfigError as e:
        return [Finding(check="configuration", level="fail", what=str(e), fix="Mend it first: nothing else was looked at.")]
    local = [place for place in training_places(config.data) if not is_url(place)] if not plan.is_local else []
    try:
        found = examine(config, plan, this_machine())
    except ConfigError as e:  # a model that cannot be built
        return [Finding(check="model", level="fail", what=str(e), fix="Mend it first: nothing else was looked at.")]
    return [*found, *examine_hosts(plan, host_paths(plan, local))]
