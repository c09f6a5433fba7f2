"""Shared settings of the tests: determinism, no network, and skips that are counted.

Tests marked ``assets`` need the packaged models and corpora. Without them they are skipped, unless EVALKIT_REQUIRE_ASSETS=1
(CI and ``make test`` set it): then a missing asset is a failure, so that no green run hides an unexpected skip.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # workers that each take every core wait for one another
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores, 1)))

import hypothesis
import pytest
import torch

# how long an example takes says how busy the machine is
hypothesis.settings.register_profile("any load", deadline=None)
hypothesis.settings.load_profile("any load")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell that starts the tests in the background makes them ignore Ctrl-C, and some send it to themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available() and find_spec("triton") is not None:
    # Triton's own functions become interpreted or compiled ones when it is imported, which optimisers of PyTorch do somewhere
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]

NO_BROWSER = "no browser to test in"
EXPECTED_SKIPS = (
    "its attention and MLP run side by side",
    NO_BROWSER,
    "PyTorch multiplies without MKL here",
)
"""Reasons for skips that are expected everywhere; tests/README.md says why."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a browser is skipped here where there is none, so that all of it is one line of pytest's summary."""
    if item.path.parent.name != "browser" or os.environ.get("EVALKIT_REQUIRE_BROWSER") == "1":
        return
    if not Path(os.environ.get("EVALKIT_CHROMIUM", "/usr/bin/chromium")).exists() or find_spec("playwright") is None:
        how = "apt-get install chromium, or EVALKIT_CHROMIUM=PATH, and pip install playwright; then: pytest tests/browser"
        pytest.skip(f"{NO_BROWSER}, so the page was not opened in one; to get one: {how}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("assets")]
    if not marked:
        return
    from evalkit.assets.install import status

    missing = sorted(asset.name for asset in status() if not asset.installed)
    if missing and os.environ.get("EVALKIT_REQUIRE_ASSETS") != "1":
        reason = f"packaged assets not installed: {', '.join(missing)} (evalkit assets install)"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything must run, a skip that nobody expects fails the session."""
    if os.environ.get("EVALKIT_REQUIRE_ASSETS") != "1":
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            reporter.write_line(f"unexpected skip: {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
