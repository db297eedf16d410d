"""Runs as jobs of Slurm, without one: who does what, what is refused, how a queued run is shown.

tests/test_slurm_cluster.py has a real one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_job import a_config, a_tree

from rft import cli
from rft.cluster import queue
from rft.cluster.allocation import Allocation, parse_allocation, parse_options, time_limit_s
from rft.cluster.attempt import Announcement, Attempt, attempts_of
from rft.cluster.closing import close
from rft.cluster.commands import Rendezvous, engine_gpus, launch_command, launch_env, run_command
from rft.cluster.following import Hurry
from rft.cluster.machine import Place, check_equal, describe, free_ports, missing
from rft.cluster.node import Node, NodeTask
from rft.cluster.submission import check_roles, slurm_parameters, submit
from rft.config import VllmEngineConfig
from rft.engines.vllm_server import server_command
from rft.errors import ClusterError, ConfigError, UserError
from rft.listener import bound
from rft.server.settings import ServerConfig, SlurmWorkerConfig
from rft.show import overview, status
from rft.store import RunStore
from rft.tables import new_console

DEADLINE_S = 240.0
RUN = ["-m", "rft", "train"]

# --- which node does what ---


def test_the_last_nodes_sample() -> None:
    asked = Allocation(nodes=3, engine_nodes=1, gpus_per_node=8, gpus_per_engine=2)
    assert [asked.is_engine(node) for node in range(3)] == [False, False, True]
    assert (asked.num_trainers, asked.num_ranks, asked.engines_per_node) == (2, 16, 4)
    assert Allocation(nodes=2).num_ranks == 2, "on CPUs a rank per node"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"nodes": 2, "engine_nodes": 2}, "engine_nodes is 2 of 2 nodes; leave at least one that trains"),
        ({"nodes": 2, "engine_nodes": 1, "gpus_per_node": 8, "gpus_per_engine": 3}, "8 GPUs cannot be so split"),
        ({"time": "3:00"}, "time is 180 s and notice_s 120: nothing is left to train in"),
        ({"time": "soon"}, "time is 'soon'; Slurm's forms are"),
        ({"nodes": 0}, "nodes: input should be greater than or equal to 1"),
        ({"launch_config": Path("/nowhere.yaml")}, "is not there; take one of configs/accelerate/"),
    ],
)
def test_what_cannot_be_allocated_is_said(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_allocation(asked)


def test_slurm_s_time_limits_are_understood() -> None:
    forms = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "2-0": 172800, "1-12:30": 131400, "1-0:0:5": 86405}
    assert {form: time_limit_s(form) for form in forms} == forms
    assert time_limit_s("UNLIMITED") == float("inf")


def test_options_of_sbatch_are_passed_on_but_for_ours() -> None:
    assert parse_options(["qos=high", "--exclusive", "mem_per_cpu=2G"]) == {
        "qos": "high",
        "exclusive": "",
        "mem-per-cpu": "2G",
    }
    for option in ("nodes=3", "--signal=USR1@5", "=x"):
        with pytest.raises(ConfigError, match="cannot be given here"):
            parse_options([option])


def test_slurm_is_asked_for_one_task_per_node_and_a_notice(tmp_path: Path) -> None:
    asked = Allocation(nodes=2, gpus_per_node=4, time="1:00:00", partition="p", slurm={"exclusive": "", "qos": "q"})
    found = slurm_parameters(tmp_path, asked, "run-001")
    assert (found["nodes"], found["ntasks_per_node"], found["gpus_per_node"], found["signal_delay_s"]) == (2, 1, 4, 120)
    assert found["additional_parameters"] == {"requeue": True, "time": "1:00:00", "exclusive": True, "qos": "q"}
    assert found["partition"] == "p" and "account" not in found
    assert found["teardown"][-1].endswith(f'-m rft.cluster.closing {tmp_path} "$code"')
    assert "gpus_per_node" not in slurm_parameters(tmp_path, Allocation(), "run-001")
    assert slurm_parameters(tmp_path, Allocation(slurm={"cpus-per-task": "4"}), "r")["srun_args"] == [
        "--cpus-per-task=4"
    ]


# --- command lines ---


def test_one_rank_is_started_plainly_and_several_by_a_launcher(tmp_path: Path) -> None:
    meeting = Rendezvous("10.0.0.1", 29500)
    for one in (Allocation(), Allocation(gpus_per_node=1), Allocation(nodes=2, engine_nodes=1, gpus_per_node=1)):
        assert launch_command(one, 0, meeting, RUN) == [sys.executable, *RUN]
    many = launch_command(Allocation(nodes=3, engine_nodes=1, gpus_per_node=8), 1, meeting, RUN)
    words = " ".join(many)
    assert "accelerate.commands.launch --multi_gpu --mixed_precision no" in words
    assert "--num_machines 2 --machine_rank 1 --num_processes 16" in words
    assert "--main_process_ip 10.0.0.1 --main_process_port 29500 -m rft train" in words
    launch_config = tmp_path / "fsdp2.yaml"
    launch_config.touch()
    words = " ".join(launch_command(Allocation(gpus_per_node=2, launch_config=launch_config), 0, meeting, RUN))
    assert f"--config_file {launch_config} --num_machines 1" in words and "--multi_gpu" not in words
    words = " ".join(launch_command(Allocation(nodes=2), 1, meeting, RUN))
    assert "torch.distributed.run --nnodes 2 --node_rank 1 --nproc_per_node 1 --master_addr 10.0.0.1" in words
    assert launch_env(Allocation(nodes=2), tmp_path, 1) == {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    assert launch_env(Allocation(), tmp_path, 0) == {"HF_HUB_OFFLINE": "1", "RFT_ENDING": str(tmp_path / "ending.json")}


def test_accelerate_knows_the_flags() -> None:
    """Of the version that is installed: it would refuse an unknown one on the node."""
    from accelerate.commands.launch import launch_command_parser

    command = launch_command(Allocation(nodes=2, gpus_per_node=8), 1, Rendezvous("10.0.0.1", 29500), RUN)
    found = launch_command_parser().parse_args(command[3:])
    assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 16)
    assert found.main_process_port == 29500 and found.module and found.training_script == "rft"


def test_the_run_goes_on_whether_or_not_it_has_begun(tmp_path: Path) -> None:
    command = run_command(tmp_path / "runs" / "r", "train", ["http://a:1", "http://b:2"])
    assert command[-3:] == ["--run-id", "r", "--resume"]
    assert 'engine.url=["http://a:1", "http://b:2"]' in command and f'runs_dir="{tmp_path}/runs"' in command
    assert "engine.outage_limit_s=60" in command, "servers of a lost node do not come back in this attempt"
    assert not any(word.startswith("engine.") for word in run_command(tmp_path, "train", []))


def test_each_server_of_a_node_gets_its_own_gpus() -> None:
    asked = Allocation(nodes=2, engine_nodes=1, gpus_per_node=4, gpus_per_engine=2)
    assert [engine_gpus(asked, index, ["4", "5", "6", "7"]) for index in range(2)] == ["4,5", "6,7"]
    assert engine_gpus(asked, 1, None) == "2,3"
    assert engine_gpus(Allocation(nodes=2, engine_nodes=1), 0, None) is None


# --- the nodes check each other ---


def announced(node: int, **fields: Any) -> Announcement:
    told: dict[str, Any] = {"node": node, "name": f"n{node}", "host": f"h{node}", "address": "10.0.0.1", "port": 1}
    return Announcement.model_validate(told | {"num_gpus": 8, "versions": {"torch": "2.8"}} | fields)


def test_unequal_versions_are_named_with_both_nodes() -> None:
    check_equal([announced(0), announced(1)])
    with pytest.raises(ClusterError, match=r"unequal versions: torch is 2\.8 on n0 and 2\.9 on n1\n  cure: install"):
        check_equal([announced(0), announced(1, versions={"torch": "2.9"})])
    with pytest.raises(ClusterError, match=r"torch is 2\.8 on n0 and missing on n1"):
        check_equal([announced(0), announced(1, versions={})])


def test_a_node_that_cannot_take_part_says_why_to_all() -> None:
    with pytest.raises(ClusterError, match=r"n1 has no room\n  cure: make some"):
        check_equal([announced(0), announced(1, problem="n1 has no room", cure="make some")])


def test_a_node_without_its_gpus_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Place(1, ("n0", "n1"), "7", 0)
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe(place, Allocation(nodes=2, gpus_per_node=2)).problem.startswith("n1 has 0 GPUs that its driver")
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: a'; echo 'GPU 1: b'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert describe(place, Allocation(nodes=2, gpus_per_node=2)).num_gpus == 1, "what Slurm gave, not what is there"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = describe(place, Allocation(nodes=2, gpus_per_node=2))
    assert found.num_gpus == 2 and ("CPU build" in found.problem) == torch.__version__.endswith("+cpu")
    on_cpu = describe(place, Allocation(nodes=2))
    assert on_cpu.problem == "" and on_cpu.port > 0 and on_cpu.address == "127.0.0.1"


def test_a_port_that_is_taken_on_another_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded on any node."""
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    with bound("127.0.0.1", 0) as listener:
        listener.listen()
        taken = listener.getsockname()[1]
        found = describe(Place(1, ("n0", "n1"), "7", 0), Allocation(nodes=2, engine_nodes=1, port=taken))
        with pytest.raises(ClusterError, match=f"on n1: .* in use on 127.0.0.1:{taken}\n  cure: choose another --port"):
            check_equal([announced(0), found])
        several = Allocation(nodes=2, engine_nodes=1, gpus_per_node=2, port=taken - 1)
        with pytest.raises(UserError, match=f"127.0.0.1:{taken}: cannot listen"):  # of its second server
            free_ports("127.0.0.1", 1, several)
        assert len(free_ports("127.0.0.1", 1, Allocation(nodes=2, engine_nodes=1, gpus_per_node=2))) == 1


def test_a_node_that_says_nothing_is_named_with_the_cure() -> None:
    error = missing(Place(0, ("n0", "n1"), "7", 0), [1], 30.0)
    assert "n1 did not announce itself within 30 s: the run folder is not shared" in str(error)
    assert "cure: set runs_dir to a folder of the shared file system" in str(error)


def test_files_of_an_attempt_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "7", 2)
    (tmp_path / "slurm").mkdir()
    attempt.open()
    assert attempt.announced(0) is None and attempt.ended(0) is None and attempt.engines(1) is None
    attempt.announce(announced(0))
    (attempt.path / "node-1.json").write_text('{"node": 1')
    assert attempt.announced(0) == announced(0) and attempt.announced(1) is None
    attempt.beat(0)
    assert attempt.silent_s(0) < 1.0 and (tmp_path / "slurm" / "beat").exists()
    Attempt(tmp_path, "7", 0).path.mkdir()
    assert [one.restart for one in attempts_of(tmp_path, "7")] == [0, 2]


def test_a_node_that_sees_another_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "nonce").write_text("somebody else's")
    task = NodeTask(str(tmp_path), str(tmp_path), "ours", Allocation(nodes=2).model_dump(mode="json"), "train")
    task = pickle.loads(pickle.dumps(task))
    assert asyncio.run(Node(task, Place(1, ("n0", "n1"), "7", 0)).live()) == 1
    words = capsys.readouterr().err
    assert f"n1: {tmp_path} is not shared between the login node and n1" in words and "cure: set runs_dir" in words
    assert not list((tmp_path / "slurm").glob("attempt-*"))


def test_nodes_end_together_where_one_cannot_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Node 0 of two: the other one has announced a problem, before any run is started."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "nonce").write_text("ours")
    attempt = Attempt(tmp_path, "7", 0)
    attempt.open()
    attempt.announce(announced(1, problem="n1 has 0 GPUs", cure="get some"))
    task = NodeTask(str(tmp_path), str(tmp_path), "ours", Allocation(nodes=2).model_dump(mode="json"), "train")
    assert asyncio.run(Node(task, Place(0, ("n0", "n1"), "7", 0)).live()) == 1
    end = attempt.ended(0)
    assert end is not None and end.code == 1 and end.why == "n1 has 0 GPUs\n  cure: get some"
    assert end.why in capsys.readouterr().err


# --- what Slurm says, by a script in its place ---


def a_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    queue._looked.clear()


def test_slurm_s_words_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "JobId=7 JobName=a Reason=x JobState=PENDING Reason=Resources Restarts=2 ExitCode=0:0 NodeList=(null)"
    a_scontrol(tmp_path / "bin", monkeypatch, f"echo '{line.replace('a Reason=x', 'a')}'")
    found = queue.ask("7")
    assert found is not None and found.is_waiting and not found.is_over and found.num_restarts == 2
    assert found.told() == "queued (Resources)"
    a_scontrol(tmp_path / "bin", monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue.ask("7") is None
    a_scontrol(tmp_path / "bin", monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ClusterError, match=r"Unable to contact slurm controller\n  cure: check `scontrol ping`"):
        queue.ask("7")
    a_scontrol(tmp_path / "bin", monkeypatch, "sleep 20")
    with pytest.raises(ClusterError, match="scontrol did not answer"):
        queue.ask("7", 0.2)


def test_a_requeued_job_starts_once_its_last_end_has_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm takes the end of the batch script for that of the next attempt, where that has begun."""
    a_scontrol(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/said')
    waits, hurry = queue.QueuedJob("PENDING", "BeginTime", "", "0:0", 1), Hurry("7")
    hurry.look(queue.QueuedJob("COMPLETING", "", "n1", "0:0", 1), 100.0)
    for now in (101.0, 105.0, 109.0):
        hurry.look(waits, now)
    assert not (tmp_path / "said").exists()
    for now in (111.0, 112.0, 150.0):
        hurry.look(waits, now)
    assert (tmp_path / "said").read_text() == "update JobId=7 StartTime=now\n"
    hurry.look(queue.QueuedJob("PENDING", "BeginTime", "", "0:0", 0), 200.0)
    hurry.look(queue.QueuedJob("PENDING", "BeginTime", "", "0:0", 0), 300.0)
    assert (tmp_path / "said").read_text().count("\n") == 1, "a start that the user put off is left alone"


def test_a_run_in_the_queue_is_shown_so_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore.create(tmp_path / "runs", "r", {}) as store:
        store.write_state({"status": "queued"})
    (store.path / "slurm").mkdir()
    (store.path / queue.JOB).write_text('{"job_id": "7"}')
    monkeypatch.setenv("PATH", str(tmp_path))
    queue._looked.clear()
    assert status(store) == "queued", "without Slurm's commands what the folder says is shown"
    monkeypatch.undo()
    a_scontrol(tmp_path / "bin", monkeypatch, "echo 'JobId=7 JobState=PENDING Reason=Priority Restarts=0'")
    console = new_console()
    with console.capture() as shown:
        console.print(overview(store))
    assert "r: queued" in shown.get() and "Slurm job 7: queued (Priority)" in shown.get()
    with store:
        store.write_state({"status": "running", "step": 3, "steps": 4})  # and nobody writes it: preempted
    assert status(store) == "queued"
    a_scontrol(tmp_path / "bin", monkeypatch, "echo 'JobId=7 JobState=RUNNING Reason=None NodeList=n1'")
    assert status(store) == "starting"
    a_scontrol(tmp_path / "bin", monkeypatch, "echo 'JobId=7 JobState=CANCELLED Reason=None'")
    assert status(store) == "killed"


def test_a_run_of_another_machine_lives_by_its_signs(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "r", {}) as store:
        store.write_state({"status": "running"})
        assert store.is_written and store.writer() == os.getpid() and store.status == "running"
    (store.path / ".lock").write_text("1 another-machine\n")
    assert store.writer() is None and store.is_written and store.status == "running"
    long_ago = time.time() - 3600
    for path in store.path.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert not store.is_written and store.status == "killed"


# --- the last word of the batch script ---


def test_a_killed_node_0_is_queued_again_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_scontrol(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/said')
    (tmp_path / "slurm").mkdir()
    for restart in range(5):
        attempt = Attempt(tmp_path, "7", restart)
        attempt.open()
        assert close(tmp_path, "7", restart, 137) == 137 and not attempt.path.joinpath("end-0.json").exists()
        attempt.announce(announced(0))
        assert close(tmp_path, "7", restart, 137) == 137
    assert (tmp_path / "said").read_text() == "requeue 7\n" * 3
    ended = Attempt(tmp_path, "8", 0)
    ended.open()
    ended.end(0, 2, "")
    assert close(tmp_path, "8", 0, 1) == 2


# --- refused before the queue is joined ---


def test_without_slurm_or_submitit_the_cure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    has_submitit = importlib.util.find_spec("submitit") is not None
    words = "there is no sbatch here\n  cure: call rft submit on a login node" if has_submitit else "submitit is not"
    with pytest.raises(UserError, match=words):
        submit(a_config(tmp_path), Allocation())
    assert not (tmp_path / "runs").exists()


def test_engine_nodes_need_an_engine_that_serves(tmp_path: Path) -> None:
    two = Allocation(nodes=2, engine_nodes=1)
    with pytest.raises(ConfigError, match="transformers samples inside the run"):
        check_roles(a_config(tmp_path), two, "train")
    vllm = {"type": "vllm", "max_model_len": 256}
    check_roles(a_config(tmp_path, engine=vllm), two, "train")
    with pytest.raises(ConfigError, match=r"engine\.url and --engine-nodes both"):
        check_roles(a_config(tmp_path, engine=vllm | {"url": "http://a:1"}), two, "train")
    for beside in ({"num_servers": 2}, {"devices": ["0"]}, {"sleep": True}):
        with pytest.raises(ConfigError, match="engines beside the trainer, and --engine-nodes too"):
            check_roles(a_config(tmp_path, engine=vllm | beside), two, "train")
    with pytest.raises(ConfigError, match="a warm-up runs on one device"):
        check_roles(a_config(tmp_path), Allocation(nodes=2), "warmup")


def test_an_engine_is_not_started_on_a_port_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bound("127.0.0.1", 0) as listener:
        listener.listen()
        port = str(listener.getsockname()[1])
        (tmp_path / "run.yaml").write_text(json.dumps(a_tree(tmp_path)))  # JSON is YAML
        monkeypatch.setattr(sys, "argv", ["rft", "engine", str(tmp_path / "run.yaml"), "--port", port])
        with pytest.raises(SystemExit) as ending:
            cli.main()
    assert ending.value.code == 2 and f"127.0.0.1:{port}: cannot listen" in capsys.readouterr().err


def test_a_server_listens_where_other_nodes_reach_it(tmp_path: Path) -> None:
    config = a_config(tmp_path, engine={"type": "vllm", "max_model_len": 256})
    assert isinstance(config.engine, VllmEngineConfig)
    words = " ".join(server_command(config.engine, config.model, ("10.0.0.1", 8010), True, None))
    assert "--host 10.0.0.1 --port 8010" in words and "--uds" not in words


def test_a_worker_of_the_server_is_rft_submit() -> None:
    worker = {"type": "slurm", "nodes": 2, "engine_nodes": 1, "gpus_per_node": 8, "slurm": {"qos": "high"}}
    config = ServerConfig.model_validate({"models": {}, "worker": worker}).worker
    assert isinstance(config, SlurmWorkerConfig)
    options = config.options(is_warmup=False)
    assert {"--nodes=2", "--engine-nodes=1", "--gpus-per-node=8", "--slurm=qos=high"} <= set(options)
    assert {"--nodes=1", "--engine-nodes=0", "--gpus-per-node=1", "--warmup"} <= set(config.options(is_warmup=True))
    with pytest.raises(ValueError, match="leave at least one that trains"):
        ServerConfig.model_validate({"models": {}, "worker": worker | {"nodes": 1}})
    assert ServerConfig.model_validate({"models": {}}).worker.type == "local"
