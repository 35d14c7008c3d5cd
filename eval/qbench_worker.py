"""Runs one adapter of `eval/qbench/` on one job, in that competitor's environment; started by `qbench.py`.

    .qbench/hqq/bin/python eval/qbench_worker.py eval/qbench/hqq.py SCRATCH

The adapter is loaded from its path under another name: its folder on `sys.path` would let `import hqq` find the
adapter in place of the package. A mistake that an adapter can name goes into `error.txt` as one line; anything else
ends as a traceback in the log.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from qbench_exchange import ERROR_FILE, JOB_FILE, AdapterError, Job, write_result


def main() -> int:
    adapter, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    job = Job.read(scratch / JOB_FILE)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(f"qbench_adapter_{adapter.stem}", adapter)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        started = time.perf_counter()
        result = module.quantize(job)
        write_result(result, job, seconds=time.perf_counter() - started)
    except AdapterError as error:
        (scratch / ERROR_FILE).write_text(str(error), encoding="utf-8")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
