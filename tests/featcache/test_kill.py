import json
import os

import numpy as np
import pytest

from featcache.extract import ExtractConfig, run
from featcache.reader import open_cache
from featcache.store import Store, verify

from ..warm import WarmProcess

NUM_KILLS = 20

# A parent that has imported everything forks the processes that are killed: starting an interpreter
# for each would take twenty times as long as what is tested.
KILLER = """
import json, os, random, signal, sys, time
import torch
import open_clip
from featcache import extraction
from featcache.extract import ExtractConfig, run

file, num_kills = sys.argv[1], int(sys.argv[2])
values = ExtractConfig.from_yaml(file).record()
encode = extraction.encode_views

def slow(*args):
    time.sleep(0.01)
    return encode(*args)

def child(config):
    torch.set_num_threads(1)
    extraction.encode_views = slow
    sys.stdout = open(os.devnull, "w")
    run(config)

def start(config):
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        child(config)
        status = 0
    finally:
        os._exit(status)

def finished(process):
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the extraction failed by itself"
    return True

def numbered(number):
    return ExtractConfig.model_validate({**values, "cache": values["cache"] + str(number)})

# One run in peace says how long a run takes here, so that the moments fall into it.
began = time.monotonic()
assert finished(start(numbered(0)))
longest = 0.7 * (time.monotonic() - began)
moments = random.Random(7)
kills, rounds, done_at_kill = 0, 1, []
while kills < num_kills:
    config = numbered(rounds)
    rounds += 1
    while True:
        process = start(config)
        if kills < num_kills:
            time.sleep(moments.uniform(0.0, longest))
            os.kill(process, signal.SIGKILL)
        if finished(process):
            break
        kills += 1
        done = config.cache / "shards/image/c"
        done_at_kill.append(len(list(done.iterdir())) if done.is_dir() else -1)
print(json.dumps({"kills": kills, "rounds": rounds, "done": done_at_kill}))
"""


@pytest.fixture
def config(tmp_path, tiny_clip, make_jpeg):
    folder = tmp_path / "images"
    for number in range(94):
        file = folder / ("train", "val")[number % 2] / "class" / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_jpeg(36 + number % 9, 44, number))
    (folder / "train/class/30.jpg").write_bytes(b"not an image")
    return ExtractConfig.model_validate(
        {
            "dataset": {"root": str(folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": str(tmp_path / "cache"),
            "device": "cpu",
            "precision": "fp32",
            "features": {"tokens": "grid:2"},
            "batch_size": 2,
            "num_readers": 2,
            "shard_rows": 4,
            "max_invalid": 0.05,
        }
    )


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(config, tmp_path):
    whole = config.model_copy(update={"cache": tmp_path / "whole"})
    run(whole)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    arguments = [str(file), str(NUM_KILLS)]
    killer = WarmProcess("-c", KILLER, *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output, errors, status = killer.wait(240)
    assert status == 0, errors
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["kills"] >= NUM_KILLS
    # The moments must have fallen into the work, not only before or after it.
    assert sum(0 < done < 24 for done in outcome["done"]) >= NUM_KILLS // 3
    expected = open_cache(whole.cache)
    for number in range(outcome["rounds"]):
        path = tmp_path / f"cache{number}"
        assert verify(path) == []
        found = open_cache(path)
        assert found.fingerprint == expected.fingerprint
        assert found.valid.sum() == 93
        for name in ("image/projected", "image/tokens"):
            first, second = found.array(name).read(), expected.array(name).read()
            assert first.tobytes() == second.tobytes()
        for name in ("rows/valid", "rows/content"):
            first, second = Store.open(path).read(name), Store.open(whole.cache).read(name)
            assert np.array_equal(first, second)
