"""Updates killed by the kernel at random moments."""

import json
import os
import shutil

import pytest

from featcache.extract import ExtractConfig, run
from featcache.growing import swap
from featcache.reader import open_cache
from featcache.store import Store, verify

from ...warm import WarmProcess

NUM_KILLS = 6

# A parent that has imported everything forks the processes that are killed; see test_kill.py.
KILLER = """
import json, os, random, shutil, signal, sys, time
import torch
import open_clip
from featcache import extraction
from featcache.backbones.open_clip import OpenClipConfig
from featcache.extract import ExtractConfig, run
from featcache.reader import open_cache

os.fsync = lambda descriptor: None  # what a killed process wrote stays; only a power cut loses it
file, old, num_kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
values = ExtractConfig.from_yaml(file).record()
encode, before = extraction.encode_views, open_cache(old).array("image/projected").read()

opened = ExtractConfig.model_validate(values).backbone.open("cpu", "fp32")
OpenClipConfig.open = lambda self, device="cpu", precision="fp32": opened

def slow(*args):
    time.sleep(0.02)
    return encode(*args)

def start(config):
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        extraction.encode_views = slow
        sys.stdout = open(os.devnull, "w")
        run(config)
        status = 0
    finally:
        os._exit(status)

def finished(process):
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the update failed by itself"
    return True

def fresh(number):
    path = values["cache"] + str(number)
    shutil.copytree(old, path)
    return ExtractConfig.model_validate({**values, "cache": path})

began = time.monotonic()
assert finished(start(fresh(0)))
longest = time.monotonic() - began
moments = random.Random(11)
kills, rounds, begun = 0, 1, 0
while kills < num_kills:
    config = fresh(rounds)
    rounds += 1
    while True:
        process = start(config)
        if kills < num_kills:
            time.sleep(moments.uniform(0.2 * longest, longest))
            os.kill(process, signal.SIGKILL)
        if finished(process):
            break
        kills += 1
        begun += config.cache.with_name(config.cache.name + ".next").exists()
        found = open_cache(config.cache).array("image/projected").read()
        assert len(found) in (len(before), len(before) + 20)
        assert len(found) != len(before) or found.tobytes() == before.tobytes()
print(json.dumps({"kills": kills, "rounds": rounds, "begun": begun}))
"""


@pytest.fixture
def config(tmp_path, tiny_clip, make_jpeg):
    folder = tmp_path / "images/train/class"
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(make_jpeg(36, 44, number))
    return ExtractConfig.model_validate(
        {
            "dataset": {"root": str(tmp_path / "images")},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": str(tmp_path / "cache"),
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 2,
            "num_readers": 2,
            "shard_rows": 4,
        }
    )


def test_killed_at_random_moments_an_update_loses_nothing(config, tmp_path, make_jpeg):
    old = tmp_path / "old"
    run(config.model_copy(update={"cache": old}))
    folder = tmp_path / "images/train/class"
    for number in range(20):  # every second old image is followed by a new one
        (folder / f"{2 * number:02d}-new.jpg").write_bytes(make_jpeg(40, 40, 100 + number))
    whole = config.model_copy(update={"cache": tmp_path / "whole"})
    shutil.copytree(old, whole.cache)
    run(whole)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    arguments = [str(file), str(old), str(NUM_KILLS)]
    killer = WarmProcess("-c", KILLER, *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output, errors, status = killer.wait(240)
    assert status == 0, errors
    outcome = json.loads(output.splitlines()[-1])
    # Half of the moments at least must have fallen into an update that was under way.
    assert outcome["begun"] >= NUM_KILLS // 2
    expected = open_cache(whole.cache)
    for number in range(outcome["rounds"]):
        path = tmp_path / f"cache{number}"
        assert verify(path) == []
        assert not swap.next_path(path).exists()
        found = open_cache(path)
        assert found.fingerprint == expected.fingerprint
        assert len(found.history) == 1
        for name in ("image/projected", "rows/valid", "rows/content", "rows/stamp"):
            first, second = Store.open(path).read(name), Store.open(whole.cache).read(name)
            assert first.tobytes() == second.tobytes(), name
