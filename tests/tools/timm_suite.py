#!/usr/bin/env python3
"""Hold the models that a package registers with timm against timm's OWN test suite.

    python timm_suite.py --timm-checkout DIR --import-module NAME --filter 'biformer*' [--filter ...]
                         [--tests test_model_forward,...] [--json out.json] [--extended] [--non-std GLOB]
                         [--skip TEST:MODEL:REASON] [--pretrained] [--jobs N] [--timeout S] [--list]

WHAT IT DOES
  Imports timm (the installed one), then NAME, and takes the models that NAME registered and that match --filter
  (models of the same name pattern that timm itself registered are listed, but not tested; NAME=timm tests timm's).
  Per model it forks a process that runs pytest on DIR/tests/test_models.py, read where it lies: nothing of timm is
  copied, and nothing is written into DIR. Two small interventions, both in this file: timm.list_models(), which
  timm's tests call to parametrise themselves, answers with our model only; and the model's module name is added in
  memory to timm's list of modules with forward_intermediates(), as a pull request to timm would do, because timm
  would otherwise pass over a foreign model there without a word. A model without a pretrained cfg, which timm would
  leave out likewise, is run and fails. Every per-model test of test_models.py is picked up by itself, by no list.
  Prints one line per test and model, then the failures, and last `timm suite: P passed, F failed, S skipped`.
  Exit code 0 only if something passed, nothing failed, and at least one test ran for every model; 1 otherwise; 2 if
  it could not start (no such module, no matching model).

WHERE TO GET THE TESTS
  Take those of the very timm that is installed; a difference is reported as a warning and matters (1.0.31 tests far
  more than 1.0.28). The wheel has no tests, but the source package has:
    pip download timm==1.0.31 --no-deps --no-binary :all: -d DIR && tar xzf DIR/timm-1.0.31.tar.gz -C DIR
  then --timm-checkout DIR/timm-1.0.31. A git checkout does as well.

HOW LONG (per model, one thread, on a busy 2-core machine; about half of it is CPU time)
  tiny (deit_tiny, davit_tiny, swin_tiny) 30 to 60 s, base (davit_base, 88M) 110 s, --extended 1.7 times as long;
  plus 10 s once. Peak memory 1 to 2.2 GB per model. OMP_NUM_THREADS defaults to 1 here.

WHAT IS SKIPPED, AND WHY (each is shown with its reason; "n/a" is not counted as skipped)
  skip  test_model_load_pretrained, test_model_features_pretrained: only with weights in the cfg and --pretrained.
  skip  whatever timm's own rules exclude, by name (EXCLUDE_FILTERS such as *enormous*, EXCLUDE_JIT_FILTERS, ...) or
        by size (a fixed_input_size above 384 forward, 320 backward and TorchScript, 256 features and fx, 224 fx
        backward, 320 non-standard cfgs).
  skip  test_model_forward_features for models named by --non-std: timm has no such test for these.
  n/a   one of test_model_default_cfgs / test_model_default_cfgs_non_std: timm's name lists decide which of the two
        applies. A foreign model is a standard one (2d features out) unless named by --non-std (tokens out).
  n/a   of --extended: tests that feed a small hard-coded image, for fixed_input_size models.
  none  tests about timm's own models, layers and scripts (all of the other files, and most functions of
        test_models.py); --verbose and --json name those of the files that were read.
  Checks that timm's tests leave out in silence (set_grad_checkpointing() raising, absent set_input_size(), ...) come
  as `note:` lines. GITHUB_ACTIONS is unset, as timm's suite drops tests for memory's sake when it is set.

--extended (marked + in the table) re-targets tests that fit any model but that timm runs on a few of its own, see
EXTENDED below. timm does not hold all of its models to them, so take a failure there as a question, not a verdict.
"""

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import pytest

PASS, FAIL, SKIP, NA = "pass", "fail", "skip", "n/a"
THEIRS = "theirs"  # internal: a test of timm's own models, says nothing about ours

# timm's generic, per-model tests live in this file: every function in it that is parametrised with
# timm.list_models() is picked up by itself, nothing is listed here by name.
SUITE_FILE = "test_models.py"

# Tests whose body fits any model, but which timm runs on a short hard-coded list of its own models. --extended
# re-targets them at ours. 'runs': the remaining parameters, one dict per run. 'flexible': the body feeds a small
# hard-coded image, so it makes no sense for a fixed-input-size model. 'needs': (method, create_model arguments): the
# model so created must have that method.
# (Tried on a dozen of timm's backbones; tests that several of these fail themselves were left out.)
EXTENDED = {
    "test_models.py": {
        "test_reset_classifier_keeps_pool": {"flexible": True, "runs": [{}]},
        "test_features_only_grad_checkpointing_backward": {
            "flexible": True,
            "needs": ("set_grad_checkpointing", {"features_only": True}),
            "runs": [{}],
        },
        "test_features_only_feature_cls_class": {"runs": [{}]},
        "test_feature_getter_stage_ends_torchscript": {"flexible": True, "runs": [{}]},
        "test_prune_intermediate_layers_params_used": {"runs": [{}]},
        "test_head_hidden_size": {"flexible": True, "runs": [{"model_kwargs": {}}]},
        "test_headless_checkpoint_reload": {"runs": [{"kwargs": {}}]},
        "test_relpos_non_square_set_input_size": {"needs": ("set_input_size", {}), "runs": [{"kwargs": {}}]},
    },
    "test_model_input.py": {
        "test_export_tracks_reset_classifier_structure": {
            "runs": [{"kwargs": {}, "pool": None, "reload_naflex": None}]
        },
        "test_export_tracks_reset_pool_in_head": {
            "flexible": True,
            "runs": [{"num_classes": 3, "pool": "max"}, {"num_classes": 0, "pool": ""}],
        },
    },
    "test_utils.py": {
        "test_freeze_unfreeze_root_parameters": {"runs": [{}]},
    },
}

# Parts of the model API that timm's tests look for with hasattr() / getattr() and do without in silence. The runner
# says so (as notes; they change no result). What else is missing makes a test fail.
OPTIONAL_API = {
    "get_classifier": "head reset keeps device and dtype",
    "group_matcher": "parameter grouping for layer decay",
    "no_weight_decay": "names of parameters without weight decay",
    "set_input_size": "resize keeps frozen weights frozen",
}


# --------------------------------------------------------------------------------------------------
# selection: what timm.list_models() would say, restricted to one of our models, with reasons
# --------------------------------------------------------------------------------------------------


class Selection(list):
    """What a patched timm.list_models() returns: only our names; remembers what was asked for, and why not."""

    def __init__(self, names=(), query=None, why_not=None):
        super().__init__(names)
        self.query = query or {}
        self.why_not = why_not  # None, or (outcome, reason)


class Narrow:
    """Replaces timm.list_models / list_pretrained while timm's test modules are imported."""

    def __init__(self, arch, foreign_modules, non_std, is_foreign):
        from timm.models import _registry

        self.reg = _registry
        self.real = _registry.list_models
        self.arch = arch
        self.is_foreign = is_foreign
        self.foreign_modules = sorted(foreign_modules)
        self.non_std = list(non_std)
        self.non_std_seen = False

    def install(self):
        import timm

        for mod in (timm, timm.models):
            mod.list_models = self.list_models
            mod.list_pretrained = self.list_pretrained

    def list_pretrained(self, filter="", exclude_filters=""):
        return self._select(
            {"filter": filter, "exclude_filters": exclude_filters, "pretrained": True, "include_tags": True},
            sys._getframe(1),
        )

    def list_models(
        self,
        filter="",
        module="",
        pretrained=False,
        exclude_filters="",
        name_matches_cfg=False,
        include_tags=None,
    ):
        return self._select(
            {
                "filter": filter,
                "module": module,
                "pretrained": pretrained,
                "exclude_filters": exclude_filters,
                "name_matches_cfg": name_matches_cfg,
                "include_tags": include_tags,
            },
            sys._getframe(1),
        )

    def _select(self, query, frame):
        lists = {k: v for k, v in frame.f_globals.items() if k.endswith("_FILTERS") and isinstance(v, list)}
        # Do what a pull request that adds a model to timm does: name the model's module among those with
        # forward_intermediates() (else timm's tests would pass it over), and, where the caller said so, name the
        # model among the non-standard ones. In place and before the lists are used; the file on disk is not touched.
        self._append(lists.get("FEAT_INTER_FILTERS"), self.foreign_modules)
        if self._append(lists.get("NON_STD_FILTERS"), self.non_std):
            self.non_std_seen = True
        names = self._mine(**query)
        if not names and self.is_foreign and query.get("name_matches_cfg"):
            # timm leaves a model without a pretrained cfg out here; for our models that is a failure, not an excuse
            names = self._mine(**dict(query, name_matches_cfg=False))
        why_not = None if names else self._explain(query, lists)
        return Selection(names, query, why_not)

    @staticmethod
    def _append(target, items):
        if target is None:
            return False
        target.extend(x for x in items if x not in target)
        return True

    def _mine(self, **query):
        return [n for n in self.real(**query) if n.split(".", 1)[0] == self.arch]

    def _explain(self, query, lists):
        """Re-asks timm's own list_models() one criterion at a time: which one drops our model?"""
        tags = {"include_tags": bool(query.get("include_tags"))}

        def label(value, pattern=None):
            hits = [k for k, v in lists.items() if v is value or (pattern is not None and pattern in v)]
            return hits[0] if hits else "an inline list"

        if query.get("filter") and not self._mine(filter=query["filter"], **tags):
            if query["filter"] is lists.get("NON_STD_FILTERS"):
                return NA, "not in NON_STD_FILTERS: the standard counterpart of this test applies"
            return THEIRS, f"timm runs this only on its own models {_short(query['filter'])}"
        if query.get("module") and not self._mine(module=query["module"]):
            return SKIP, f"timm: module not in {label(query['module'])}"
        excluded = query.get("exclude_filters") or []
        for pattern in [excluded] if isinstance(excluded, str) else excluded:
            if not self._mine(exclude_filters=[pattern], **tags):
                name = label(None, pattern)
                return (
                    NA if name == "NON_STD_FILTERS" and query.get("include_tags") else SKIP
                ), f"timm: excluded by {pattern!r} in {name}"
        if query.get("pretrained") and not self._mine(pretrained=True):
            return SKIP, "cfg names no weights (no url / file / hf_hub_id)"
        if query.get("name_matches_cfg") and not self._mine(name_matches_cfg=True):
            return SKIP, "timm: alias, no pretrained cfg under this very name"
        return SKIP, "timm: not listed for this test (unknown reason)"


def _short(value):
    text = value if isinstance(value, str) else ", ".join(map(str, value))
    return repr(text if len(text) < 40 else text[:37] + "...")


# --------------------------------------------------------------------------------------------------
# the pytest plugin: one instance per model, in a forked child
# --------------------------------------------------------------------------------------------------


class TestTimeout(
    BaseException
):  # not an Exception: timm's tests swallow those around set_grad_checkpointing()
    __test__ = False


class Plugin:
    def __init__(self, arch, opts, narrow, fixed_input_size, done, send):
        self.arch, self.opts, self.narrow, self.done, self.send = arch, opts, narrow, done, send
        self.fixed_input_size = fixed_input_size
        self.cells = {}  # nodeid -> cell
        self.reports = {}  # nodeid -> its reports so far
        self.needs = {}  # nodeid -> method that the model must have
        self.extra = []  # cells that will not run
        self.other = set()  # test functions that are about timm's own models
        self.seen = set()
        self.errors = []
        self.order = 0

    # -- collection --

    def pytest_configure(self, config):
        for mark in (
            "timeout",
            "base",
            "forward",
            "backward",
            "cfg",
            "cfg_nonstd",
            "torchscript",
            "features",
            "fxforward",
            "fxbackward",
        ):
            config.addinivalue_line("markers", f"{mark}: timm")

    def _wanted(self, name, extended):
        if self.opts.tests:
            return any(fnmatch.fnmatchcase(name, t) for t in self.opts.tests)
        return self.opts.extended or not extended

    def _extended(self, metafunc):
        return EXTENDED.get(Path(str(metafunc.definition.path)).name, {}).get(
            metafunc.definition.originalname
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        """Before pytest's own parametrisation: hand the re-targeted tests our model instead of timm's."""
        spec = self._extended(metafunc)
        if not spec or not self._wanted(metafunc.definition.originalname, True):
            return
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            names = _argnames(mark)
            if "model_name" in names:
                runs = [dict(run, model_name=self.arch) for run in spec["runs"]]
                if any(set(run) != set(names) for run in runs):
                    self.errors.append(
                        f"{metafunc.definition.originalname}: timm changed its parameters to {names}"
                    )
                    return
                values = [tuple(run[n] for n in names) for run in runs]
                marks[i] = pytest.mark.parametrize(
                    ",".join(names), [v[0] for v in values] if len(names) == 1 else values
                ).mark

    def pytest_collectreport(self, report):
        if report.failed:
            self.errors.append(f"collecting {report.nodeid}: {_last_line(report.longreprtext)}")

    def pytest_collection_modifyitems(self, config, items):
        keep, drop = [], []
        for item in items:
            (keep if self._keep(item) else drop).append(item)
        items[:] = keep
        config.hook.pytest_deselected(items=drop)
        if self.narrow.non_std and not self.narrow.non_std_seen:
            self.errors.append("--non-std: this test suite has no NON_STD_FILTERS list")
        self.send(
            "plan",
            {
                "run": list(self.cells.values()),
                "extra": self.extra,
                "other": sorted(self.other),
                "seen": sorted(self.seen),
            },
        )
        if self.opts.list:
            items[:] = []

    def _keep(self, item):
        name = getattr(item, "originalname", item.name)
        file = Path(str(item.path)).name
        extended = EXTENDED.get(file, {}).get(name)
        params = getattr(getattr(item, "callspec", None), "params", {})
        selection = next(
            (
                m.args[1]
                for m in item.iter_markers("parametrize")
                if len(m.args) > 1 and isinstance(m.args[1], Selection)
            ),
            None,
        )
        if selection is None and not extended:
            self.other.add(name)
            return False
        if selection is not None and not selection and selection.why_not[0] == THEIRS and not extended:
            self.other.add(name)
            return False
        self.seen.add(name)
        if not self._wanted(name, bool(extended)):
            return False
        rest = {k: v for k, v in params.items() if k not in ("model_name", "batch_size")}
        model = params.get("model_name")
        model = model if isinstance(model, str) else self.arch
        variants = len(extended["runs"]) > 1 if extended else False
        stacked = [k for k in rest if not extended or not all(k in run for run in extended["runs"])]
        shown = {k: v for k, v in rest.items() if variants or k in stacked}
        suffix = "[" + ",".join(f"{k}={v!r}" for k, v in shown.items() if v != {}) + "]" if shown else ""
        self.order += 1
        cell = {
            "file": file,
            "test": name + suffix,
            "arch": self.arch,
            "model": model,
            "extended": bool(extended),
            "order": self.order,
        }

        if key(cell) in self.done:
            return False
        outcome, reason = None, None
        if extended and extended.get("flexible") and self.fixed_input_size:
            outcome, reason = NA, "feeds a small hard-coded image; the cfg says fixed_input_size"
        elif not extended and not len(selection):
            outcome, reason = selection.why_not
        elif not extended and selection.query.get("pretrained") and not self.opts.pretrained:
            outcome, reason = SKIP, "loads weights from the network; give --pretrained to run it"
        for pattern, glob, why in self.opts.skip:
            if fnmatch.fnmatchcase(name, pattern) and fnmatch.fnmatchcase(self.arch, glob):
                outcome, reason = SKIP, f"--skip: {why}"
        if outcome:
            self.extra.append(dict(cell, outcome=outcome, reason=reason, seconds=0.0))
            return False
        self.cells[item.nodeid] = cell
        if extended:
            self.needs[item.nodeid] = extended.get("needs")
        return True

    # -- running --

    def pytest_runtest_setup(self, item):
        import timm
        import torch

        method, kwargs = self.needs.get(item.nodeid) or (None, {})
        if method:
            model = timm.create_model(self.arch, **kwargs)
            if not hasattr(model, method):
                pytest.skip(f"{type(model).__name__} has no {method}()")
        torch.manual_seed(self.opts.seed)

    def pytest_runtest_protocol(self, item, nextitem):
        self.send("start", self.cells[item.nodeid])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item):
        def on_alarm(signum, frame):
            raise TestTimeout(f"took longer than {self.opts.timeout:g} s")

        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, self.opts.timeout)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report):
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when != "teardown":
            return
        cell = dict(self.cells[report.nodeid], outcome=FAIL, reason="did not run", seconds=0.0)
        for r in self.reports.pop(report.nodeid):
            cell["seconds"] += r.duration
            if r.failed:
                crash = getattr(r.longrepr, "reprcrash", None)
                cell.update(outcome=FAIL, details=str(r.longrepr))
                cell["reason"] = _last_line(str(r.longrepr))
                if crash:
                    where = f" [{Path(crash.path).name}:{crash.lineno}]"
                    cell["reason"] = _oneline(crash.message, 240) + where
                break
            if r.skipped:
                path, _, reason = r.longrepr if isinstance(r.longrepr, tuple) else ("", 0, str(r.longrepr))
                reason = re.sub(r"^Skipped: ", "", reason)
                if Path(path).is_relative_to(self.opts.timm_checkout):
                    cell.update(outcome=SKIP, reason=f"timm: {reason}")
                elif Path(path).resolve() == Path(__file__).resolve():
                    cell.update(outcome=SKIP, reason=reason)
                else:
                    cell.update(
                        outcome=FAIL,
                        reason=f"skipped neither by timm nor by this runner but by {path}: {reason}",
                    )
                break
            if r.when == "call":
                cell.update(outcome=PASS, reason="")
        cell["seconds"] = round(cell["seconds"], 2)
        self.send("cell", cell)


def _argnames(mark):
    if mark.name != "parametrize" or not mark.args:
        return []
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _oneline(text, limit=300):
    text = " ".join(str(text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _last_line(text):
    lines = [x for x in str(text).splitlines() if x.strip()]
    return _oneline(lines[-1]) if lines else "no message"


def probe(arch):
    """Notes on what timm's tests pass over in silence for this model."""
    import timm
    import torch

    notes = []
    try:
        with torch.device("meta"):  # no memory needed
            model = timm.create_model(arch, pretrained=False)
    except Exception:
        try:
            model = timm.create_model(arch, pretrained=False)
        except Exception as e:
            return [f"create_model() fails: {_oneline(e)}"]
    missing = [f"{k} ({v})" for k, v in OPTIONAL_API.items() if not callable(getattr(model, k, None))]
    if missing:
        notes.append("absent, so silently not checked: " + "; ".join(missing))
    try:
        model.set_grad_checkpointing()
    except Exception as e:
        notes.append(
            f"set_grad_checkpointing() raises {type(e).__name__}: grad checkpointing silently not checked"
        )
    cfg = model.default_cfg or {}
    if cfg.get("fixed_input_size"):
        notes.append(f"cfg says fixed_input_size: no test feeds any size but {tuple(cfg['input_size'])}")
    elif cfg.get("min_input_size"):
        notes.append(
            f"cfg has min_input_size: the tests with small images feed {tuple(cfg['min_input_size'])}"
        )
    if max(cfg.get("input_size") or (0,)) > 448:
        notes.append("input_size > 448: shapes silently not checked in test_model_default_cfgs")
    if not cfg.get("num_classes"):
        notes.append("cfg num_classes is 0/None: classifier name silently not checked")
    return notes


def child(arch, opts, state, done, conn, log):
    """Runs the suite for one model, less what is done. A process of its own: a model may crash or eat memory."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def send(kind, payload):
        conn.send((kind, arch, payload))

    narrow = Narrow(arch, state["foreign_modules"], opts.non_std, arch in state["foreign"])
    narrow.install()
    cfg = narrow.reg._model_pretrained_cfgs.get(arch)
    plugin = Plugin(arch, opts, narrow, bool(cfg and cfg.fixed_input_size), done, send)
    args = [
        "-c",
        os.devnull,
        f"--rootdir={opts.timm_checkout}",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--disable-warnings",
        "-q",
        "--tb=short",
        f"--basetemp={state['tmp']}/{arch}",
        *state["files"],
    ]
    rc = int(pytest.main(args, plugins=[plugin]))
    if rc not in (0, 1, 5):
        plugin.errors.append(f"pytest ended with exit code {rc}")
    send("done", {"errors": plugin.errors, "notes": probe(arch) if plugin.cells and not opts.list else []})
    conn.close()
    sys.stdout.flush()
    os._exit(0)


# --------------------------------------------------------------------------------------------------
# the parent
# --------------------------------------------------------------------------------------------------


def register(opts):
    """Imports timm, then the package; returns the names that the package brought."""
    import timm
    from timm.models import _registry

    before = dict(_registry._model_entrypoints)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module(opts.import_module)
    overwrites = [str(w.message) for w in caught if "in registry" in str(w.message)]
    entry = _registry._model_entrypoints
    root = opts.import_module.split(".")[0]
    if root == "timm":
        mine = set(entry)
    else:
        mine = {
            n for n, fn in entry.items() if before.get(n) is not fn or fn.__module__.split(".")[0] == root
        }
    listed = _registry.list_models()
    chosen = [n for n in listed if n in mine and any(fnmatch.fnmatchcase(n, f) for f in opts.filter)]
    ignored = [n for n in listed if n not in mine and any(fnmatch.fnmatchcase(n, f) for f in opts.filter)]
    empty = [f for f in opts.filter if not any(fnmatch.fnmatchcase(n, f) for n in chosen)]
    foreign = {n for n in chosen if entry[n].__module__.split(".")[0] != "timm"}
    return timm, {
        "chosen": chosen,
        "ignored": ignored,
        "empty": empty,
        "foreign": foreign,
        "warnings": overwrites,
        "foreign_modules": {_registry._model_to_module[n] for n in foreign},
    }


def checkout_version(root):
    try:
        return re.search(r'[\'"](.+?)[\'"]', (root / "timm" / "version.py").read_text()).group(1)
    except (OSError, AttributeError):
        return "unknown"


def key(cell):
    return cell["file"], cell["test"], cell["model"]


def death_note(log):
    """What a process left behind: the newest frames of faulthandler's stack, else the last lines."""
    fatal = [i for i, line in enumerate(log) if "Fatal Python error" in line]
    return log[fatal[-1] : fatal[-1] + 14] if fatal else log[-12:]


def run_all(opts, state):
    ctx = multiprocessing.get_context("fork")
    todo, running, results = deque(state["chosen"]), {}, {}
    logs = Path(opts.log_dir) if opts.log_dir else Path(state["tmp"])
    logs.mkdir(parents=True, exist_ok=True)

    def start(r):
        ours, theirs = ctx.Pipe(duplex=False)
        log = logs / f"{r['arch']}.log"
        with open(log, "a") as f:
            done = {key(c) for c in r["cells"]}
            r["proc"] = ctx.Process(target=child, args=(r["arch"], opts, state, done, theirs, f))
            r["proc"].start()
        theirs.close()
        r.update(log=log, now=None, done=False, last=time.time())
        running[ours] = r

    def finish(conn, why=None):
        r = running.pop(conn)
        conn.close()
        if why:
            r["proc"].kill()
        r["proc"].join()
        if not r["done"]:
            why = why or f"the test process died with exit code {r['proc'].exitcode}"
            tail = death_note(r["log"].read_text(errors="replace").splitlines())
            have = {key(c) for c in r["cells"]}
            left = [c for c in (r["plan"] or {"run": []})["run"] if key(c) not in have]
            for c in left:
                if key(c) == r["now"]:
                    r["cells"].append(
                        dict(
                            c,
                            outcome=FAIL,
                            seconds=round(time.time() - r["last"], 2),
                            reason=why,
                            details="\n".join([why, *tail]),
                        )
                    )
                    if len(left) > 1:
                        start(r)  # a new process for the rest
                        return
                    break
            else:
                r["errors"].append(f"{why}: {_oneline(' | '.join(tail))}")
                r["cells"] += [dict(c, outcome=FAIL, seconds=0.0, reason=f"did not run: {why}") for c in left]
        count = Counter(c["outcome"] for c in r["cells"])
        results[r["arch"]] = r
        print(
            f"[{len(results)}/{len(state['chosen'])}] {r['arch']}: {count[PASS]} passed, {count[FAIL]} failed, "
            f"{count[SKIP]} skipped in {time.time() - r['t0']:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    while todo or running:
        while todo and len(running) < max(1, opts.jobs):
            start(
                {
                    "arch": todo.popleft(),
                    "plan": None,
                    "cells": [],
                    "errors": [],
                    "notes": [],
                    "t0": time.time(),
                }
            )
        for conn in wait_for(list(running), timeout=1.0):
            r = running[conn]
            try:
                kind, _, payload = conn.recv()
            except EOFError:
                finish(conn)
                continue
            r["last"] = time.time()
            if kind == "plan":
                if r["plan"] is None:
                    r["plan"] = payload
                    r["cells"] += payload["extra"]
            elif kind == "start":
                r["now"] = key(payload)
            elif kind == "cell":
                r["cells"].append(payload)
                r["now"] = None
            elif kind == "done":
                r["done"] = True
                r["errors"] += payload["errors"]
                r["notes"] += payload["notes"]
        for conn, r in list(running.items()):
            if time.time() - r["last"] > opts.timeout + 60:
                finish(conn, f"hung: no sign of life for {opts.timeout + 60:g} s")
    return [results[a] for a in state["chosen"]]


def report(opts, results):
    cells = [c for r in results for c in r["cells"]]
    if opts.list:
        cells += [
            dict(c, outcome="run", reason="", seconds=0.0)
            for r in results
            if r["plan"]
            for c in r["plan"]["run"]
        ]
    archs = [r["arch"] for r in results]
    cells.sort(key=lambda c: (archs.index(c["arch"]), c["extended"], c["order"]))
    wt = max([len(c["test"]) + 2 * c["extended"] for c in cells] + [4])
    wm = max([len(c["model"]) for c in cells] + [5])
    print()
    print(f"{'test':{wt}}  {'model':{wm}}  {'result':6}  seconds")
    for c in cells:
        took = f"{c['seconds']:7.1f}" if c["outcome"] in (PASS, FAIL) else " " * 7
        why = f"  ({c['reason']})" if c["outcome"] in (SKIP, NA, FAIL) else ""
        print(
            f"{('+ ' if c['extended'] else '') + c['test']:{wt}}  {c['model']:{wm}}  {c['outcome']:6}  {took}{why}"
        )
    if any(c["extended"] for c in cells):
        print("(+ = timm runs this test on a few models of its own; re-targeted at ours)")

    failed = [c for c in cells if c["outcome"] == FAIL]
    for c in failed:
        print(f"\n--- FAIL {c['test']} {c['model']}")
        lines = (c.get("details") or c["reason"]).splitlines()
        shown = lines if opts.verbose or len(lines) <= 25 else ["  ...", *lines[-25:]]
        print("\n".join("  " + x for x in shown))
    for r in results:
        for note in r["notes"]:
            print(f"note: {r['arch']}: {note}")
        if not any(c["outcome"] in (PASS, FAIL) for c in r["cells"]) and not opts.list:
            r["errors"].append("not a single test ran for this model")
    return cells


def parse(argv):
    p = argparse.ArgumentParser(
        description="Run timm's own model tests on the models that a package registers with timm."
    )
    p.add_argument(
        "--timm-checkout",
        required=True,
        type=lambda s: Path(s).resolve(),
        help="directory with timm's tests/ (a git checkout or an unpacked sdist)",
    )
    p.add_argument("--import-module", required=True, help="package that registers its models when imported")
    p.add_argument(
        "--filter", required=True, action="append", help="glob on model names without tag; may be repeated"
    )
    p.add_argument(
        "--tests", default="", help="comma-separated names (globs) of test functions; default: all"
    )
    p.add_argument("--json", help="write every result there")
    p.add_argument(
        "--extended",
        action="store_true",
        help="also run the tests that timm applies to a few models of its own but that fit any model",
    )
    p.add_argument(
        "--non-std",
        action="append",
        default=[],
        metavar="GLOB",
        help="treat these models as in timm's NON_STD_FILTERS (token output, no plain features_only)",
    )
    p.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="TEST:MODEL:REASON",
        help="do not run TEST (glob) on MODEL (glob); shown as skipped, with the reason",
    )
    p.add_argument(
        "--pretrained", action="store_true", help="also run the tests that load pretrained weights"
    )
    p.add_argument("--timeout", type=float, default=600, help="seconds per test (default %(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="models at a time (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="torch seed before every test (default %(default)s)")
    p.add_argument("--list", action="store_true", help="only show what would run")
    p.add_argument("--log-dir", help="keep the raw pytest output of every model there")
    p.add_argument("--verbose", action="store_true", help="full tracebacks")
    opts = p.parse_args(argv)
    opts.tests = [t.strip() for t in opts.tests.split(",") if t.strip()]
    skips = []
    for s in opts.skip:
        parts = s.split(":", 2)
        if len(parts) != 3 or not all(x.strip() for x in parts):
            p.error(f"--skip needs TEST:MODEL:REASON, got {s!r}")
        skips.append([x.strip() for x in parts])
    opts.skip = skips
    if not (opts.timm_checkout / "tests" / SUITE_FILE).is_file():
        p.error(f"no tests/{SUITE_FILE} in {opts.timm_checkout}")
    return opts


def main(argv=None):
    opts = parse(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)
    # on GitHub timm's suite drops whole tests and more models for want of memory; we want all of it
    os.environ.pop("GITHUB_ACTIONS", None)
    if not opts.pretrained:
        os.environ["HF_HUB_OFFLINE"] = "1"
    sys.dont_write_bytecode = True  # nothing is written into the checkout
    # the directory of this script and the checkout must not lend their modules to the run
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [x for x in sys.path if os.path.abspath(x or ".") not in (here, str(opts.timm_checkout))]

    try:
        timm, state = register(opts)
    except Exception as e:
        print(f"error: cannot import {opts.import_module}: {type(e).__name__}: {e}", file=sys.stderr)
        print("timm suite: 0 passed, 0 failed, 0 skipped")
        return 2
    if Path(timm.__file__).resolve().is_relative_to(opts.timm_checkout):
        print(
            "error: timm itself was imported from --timm-checkout, not from the environment", file=sys.stderr
        )
        return 2
    import torch

    theirs = checkout_version(opts.timm_checkout)
    commit = (
        subprocess.run(
            ["git", "-C", str(opts.timm_checkout), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
        )
        if (opts.timm_checkout / ".git").exists()
        else None
    )
    commit = commit.stdout.strip() if commit and commit.returncode == 0 else None
    print(
        f"timm {timm.__version__} ({Path(timm.__file__).parent}), torch {torch.__version__}, "
        f"tests of timm {theirs}{' @ ' + commit if commit else ''} ({opts.timm_checkout})"
    )
    if theirs != timm.__version__:
        print(f"warning: the tests are of timm {theirs}, the installed timm is {timm.__version__}")
    for w in state["warnings"]:
        print(f"warning: {w}")
    if state["ignored"]:
        print(
            f"not tested, registered by timm and not by {opts.import_module}: {', '.join(state['ignored'])}"
        )
    if state["empty"] or not state["chosen"]:
        print(f"error: {opts.import_module} registers no model that matches {', '.join(state['empty'])}")
        print("timm suite: 0 passed, 0 failed, 0 skipped")
        return 2
    print(f"{len(state['chosen'])} model(s): {', '.join(state['chosen'])}")
    if opts.non_std:
        print(f"treated as non-standard (--non-std): {', '.join(opts.non_std)}")
    sys.stdout.flush()

    tests = opts.timm_checkout / "tests"
    wanted = [SUITE_FILE] + [
        f
        for f in EXTENDED
        if f != SUITE_FILE
        and (
            any(fnmatch.fnmatchcase(n, t) for n in EXTENDED[f] for t in opts.tests)
            if opts.tests
            else opts.extended
        )
    ]
    state["files"] = [str(tests / f) for f in wanted if (tests / f).is_file()]
    absent = [f for f in wanted if not (tests / f).is_file()]

    with tempfile.TemporaryDirectory(prefix="timm_suite_") as tmp:
        state["tmp"] = tmp
        results = run_all(opts, state)
        cells = report(opts, results)

    errors = [f"{r['arch']}: {e}" for r in results for e in r["errors"]]
    seen = {n for r in results if r["plan"] for n in r["plan"]["seen"]}
    if any(r["plan"] for r in results):
        for t in opts.tests:
            if not any(fnmatch.fnmatchcase(n, t) for n in seen):
                errors.append(f"--tests {t}: no such per-model test (there are: {', '.join(sorted(seen))})")
        if opts.extended and not opts.tests:
            gone = sorted(n for f in EXTENDED.values() for n in f if n not in seen)
            if gone:
                print(
                    f"note: not in these tests: {', '.join(gone)}{' (no ' + ', '.join(absent) + ')' if absent else ''}"
                )
    other = sorted({n for r in results if r["plan"] for n in r["plan"]["other"]})
    if other and opts.verbose:
        print(f"not applicable, about timm's own models or modules only ({len(other)}): {', '.join(other)}")
    for e in errors:
        print(f"error: {e}")

    count = Counter(c["outcome"] for c in cells)
    if opts.json:
        Path(opts.json).write_text(
            json.dumps(
                {
                    "timm": timm.__version__,
                    "tests": theirs,
                    "commit": commit,
                    "torch": torch.__version__,
                    "import_module": opts.import_module,
                    "filters": opts.filter,
                    "models": state["chosen"],
                    "passed": count[PASS],
                    "failed": count[FAIL],
                    "skipped": count[SKIP],
                    "not_applicable": count[NA],
                    "errors": errors,
                    "notes": {r["arch"]: r["notes"] for r in results},
                    "other_tests": other,
                    "results": cells,
                },
                indent=1,
            )
            + "\n"
        )
    print(f"timm suite: {count[PASS]} passed, {count[FAIL]} failed, {count[SKIP]} skipped")
    if opts.list:
        return 2 if errors else 0
    return 0 if count[PASS] and not count[FAIL] and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
