"One GPU for all: processes of their own, one after another. A GPU is made up: PyTorch is told that there is one."
import os
import subprocess
import sys
import tempfile
import time

import pytest

from ehr_r1 import gpu


@pytest.fixture
def with_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, 'has_gpu', lambda: True)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    return tmp_path


def test_without_a_gpu_work_is_done_here():
    assert gpu.by_itself(os.getpid) == os.getpid()


def test_with_a_gpu_each_piece_of_work_has_a_process_that_ends(with_gpu):
    first, second = gpu.by_itself(os.getpid), gpu.by_itself(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    for process in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_goes_wrong_there_is_raised_here_and_the_lock_is_free_again(with_gpu):
    with pytest.raises(ValueError, match='invalid literal'):
        gpu.by_itself(int, 'x')
    assert gpu.by_itself(int, '3') == 3


HOLD = '''
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from ehr_r1.gpu import gpu_lock
with gpu_lock():
    print('held', flush=True)
    time.sleep(2)
'''


def test_two_runs_wait_for_each_other_but_not_for_another_gpu(with_gpu, monkeypatch):
    command = [sys.executable, '-c', HOLD, str(with_gpu)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        began = time.monotonic()
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
        assert gpu.by_itself(abs, -1) == 1
        assert other.poll() is None
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
        assert gpu.by_itself(abs, -2) == 2
        assert time.monotonic() - began > 1
