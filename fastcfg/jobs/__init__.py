"""Batch jobs: many samples, in units that survive crashes, computed by one machine or many.

`run("spec.toml", "out")` begins or resumes a job, `status("out")` says how far it is, `open("out")` reads its samples, and
`export("out", "png", "folder")` writes them for other tools. docs/jobs.md has the promises.
"""

from fastcfg.jobs.dataset import open
from fastcfg.jobs.errors import DamagedError, JobError, StoppedError
from fastcfg.jobs.export import export
from fastcfg.jobs.job import Job, open_job
from fastcfg.jobs.run import Status, run, set_aside, status
from fastcfg.jobs.spec import Spec
from fastcfg.jobs.stores import open_store
from fastcfg.jobs.units import Unit, all_units, check_unit, compute, get_unit, read_unit, write_unit

__all__ = [
    "DamagedError",
    "Job",
    "JobError",
    "Spec",
    "Status",
    "StoppedError",
    "Unit",
    "all_units",
    "check_unit",
    "compute",
    "export",
    "get_unit",
    "open",
    "open_job",
    "open_store",
    "read_unit",
    "run",
    "set_aside",
    "status",
    "write_unit",
]
