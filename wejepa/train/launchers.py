"""How this process was started: alone, or as one of several by torchrun, by srun, or by whatever sets the same variables.

    torchrun                            its own variables, which win over all others
    Kubernetes, a cluster's launcher    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_RANK where there is one
    srun                                SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID

WORLD_SIZE=1 is a run of its own, under srun too. So is a process of a plain sbatch script or of a salloc shell, however many tasks the job
has (SLURM_NTASKS): only srun starts them, and only in its steps there is a SLURM_STEP_NUM_TASKS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from wejepa.errors import ConfigError

__all__ = ["Launch", "launched"]

MEANING = {
    "RANK": "this process's number, from 0",
    "WORLD_SIZE": "the number of processes, or to 1 for a run of its own",
    "LOCAL_RANK": "this process's number on its machine, from 0",
    "MASTER_ADDR": "the machine of rank 0",
    "MASTER_PORT": "a free port of the machine of rank 0",
}
Variables = dict[str, tuple[str, str]]  # what is meant, by torchrun's names -> the variable that tells it, and its value


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on its machine, from 0; None where no variable tells.
        address, port: where they meet, on the machine of rank 0.
        torchrun: whether torchrun started it.
    """

    rank: int
    world: int
    local_rank: int | None
    address: str
    port: int
    torchrun: bool


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process was started, by its environment; None for alone.

    Raises:
        ConfigError: variables that do not fit together, by name.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in environment
    given: Variables = {name: (name, environment[name]) for name in MEANING if environment.get(name, "").strip()}
    step = {} if torchrun else _step_of_slurm(environment)
    if "RANK" in given:  # whoever numbers the processes need not have one for each of Slurm's
        step.pop("LOCAL_RANK", None)
    elif step and given.get("WORLD_SIZE", step["WORLD_SIZE"])[1] not in ("1", step["WORLD_SIZE"][1]):
        raise ConfigError(
            f"WORLD_SIZE = {given['WORLD_SIZE'][1]}, but srun started SLURM_STEP_NUM_TASKS = {step['WORLD_SIZE'][1]} processes: "
            f"set RANK too, or leave both to Slurm"
        )
    given = step | given
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        return None
    world = _number(given, "WORLD_SIZE", least=1)
    if world == 1 and not torchrun:
        if given.get("RANK", ("",))[0] == "RANK":
            _number(given, "RANK", below=1)
        return None
    return Launch(
        rank=_number(given, "RANK", below=world),
        world=world,
        local_rank=_number(given, "LOCAL_RANK", below=world) if "LOCAL_RANK" in given else None,
        address=_text(given, "MASTER_ADDR"),
        port=_number(given, "MASTER_PORT", least=1, below=1 << 16),
        torchrun=torchrun,
    )


def _step_of_slurm(environment: Mapping[str, str]) -> Variables:
    """What srun tells a process of a step with several; nothing in a step with one, and nothing outside of one."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    step = {meant: (name, environment[name]) for meant, name in names.items() if environment.get(name, "").strip()}
    if not {"RANK", "WORLD_SIZE"} <= step.keys() or step["WORLD_SIZE"][1] == "1":
        return {}
    if nodes := environment.get("SLURM_STEP_NODELIST"):
        step["MASTER_ADDR"] = ("SLURM_STEP_NODELIST", _first_of_nodes(nodes))
    elif node := environment.get("SLURM_LAUNCH_NODE_IPADDR"):  # where srun was called, and the job has its first node as a rule
        step["MASTER_ADDR"] = ("SLURM_LAUNCH_NODE_IPADDR", node)
    job, number = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "0")
    if job.isdecimal() and number.isdecimal():  # below the ports that the system gives away itself; one for each step of a job
        step["MASTER_PORT"] = ("SLURM_JOB_ID", str(10_000 + (int(job) + 997 * int(number)) % 20_000))
    return step


def _first_of_nodes(nodes: str) -> str:
    """The first name of a list in Slurm's short form: "gpu[07-09,12],login1" begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _text(given: Variables, meant: str) -> str:
    if meant not in given:
        others = ", ".join(f"{name} = {value}" for name, value in given.values())
        raise ConfigError(f"{meant} is not set, but {others}: set it to {MEANING[meant]}")
    return given[meant][1].strip()


def _number(given: Variables, meant: str, least: int = 0, below: int | None = None) -> int:
    text, name = _text(given, meant), given[meant][0]
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        limits = f"from {least}" + (f" to {below - 1}" if below is not None else " up")
        many = f", as {given['WORLD_SIZE'][0]} = {given['WORLD_SIZE'][1]}" if meant in ("RANK", "LOCAL_RANK") else ""
        raise ConfigError(f"{name} = {text!r} is no whole number {limits}{many}: set it to {MEANING[meant]}")
    return int(text)
