"""Errors of the machine, tried for real: a full disk, read-only folders, few file handles, killed workers, signals."""
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from ehr_r1 import machine, pipeline
from ehr_r1.command import main
from ehr_r1.config import LONGEST_NAME, Run
from ehr_r1.inference.endpoints import InferenceError, Refused
from ehr_r1.machine import NoRoom, Stopped, check_room, machine_fault, stopped_by_signals
from ehr_r1.pipeline import ORDER, Reproduction
from ehr_r1.profiles import profile
from ehr_r1.stages import build, fingerprint, locked

WORDS = ['profile=smoke', 'patients=20', 'workers=1', 'run=x']
FIRST = ORDER[:3]  # hospital, trajectories, index

@pytest.fixture
def home(tmp_path, monkeypatch):
    "Where runs go."
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.delenv('EHR_R1_DEBUG', raising=False)
    return tmp_path

@pytest.fixture
def told(home, capsys):
    "What the command says on the error stream, and its exit code; no traceback and no more than two lines."
    def run(*words):
        code = main([*WORDS, *words])
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line and '%' not in line]
        assert 'Traceback' not in said
        assert len(lines) <= 2, said
        return code, '\n'.join(lines)
    return run

# what a child process runs: the stages of WORDS after a line that spoils something
CHILD = '''
import os, resource, signal, sys
from ehr_r1 import command, pipeline
{spoil}
sys.exit(command.main(sys.argv[1:]))
'''

def start(*words, spoil='', **more):
    "The command in a process of its own."
    command = [sys.executable, '-c', CHILD.format(spoil=spoil), *WORDS, *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    return subprocess.Popen(command, preexec_fn=begun, **pipes, **more)

def ended(process):
    "Its exit code, and what it said on the error stream."
    _, said = process.communicate(timeout=300)
    lines = [line for line in said.splitlines() if line and '%' not in line]
    assert 'Traceback' not in said
    return process.returncode, '\n'.join(lines)

# --- what is said

NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO]

@pytest.mark.parametrize('number', NUMBERS)
@pytest.mark.parametrize('kind', [
    lambda number: OSError(number, os.strerror(number), 'runs/x/index'),
    lambda number: RuntimeError(f'IoError: {os.strerror(number)} (os error {number})')])
def test_error_of_the_machine_in_any_words(number, kind):
    error = kind(number)
    assert machine.REMEDIES[number] in machine_fault(error)
    try:
        raise ValueError('shard 3') from error
    except ValueError as outer:
        assert machine_fault(outer) == machine_fault(error)

def test_error_of_the_machine_is_not_read_into_others():
    assert machine_fault(ValueError('error 28 of 30')) is None
    try:
        try:
            raise OSError(errno.ENOSPC, 'full')
        except OSError:
            raise ValueError('what to do is said here') from None
    except ValueError as e:
        assert machine_fault(e) is None

def test_what_was_not_foreseen_is_one_line_and_a_way_to_see_more(home, told, monkeypatch, capsys):
    def fails(r):
        raise ZeroDivisionError('integer division')
    monkeypatch.setitem(pipeline.STAGES, 'index', fails)
    code, said = told(*FIRST)
    assert code == 1
    assert said.startswith('ZeroDivisionError: integer division; this was not foreseen, EHR_R1_DEBUG=1 shows where')
    assert f'in index; finished stages and what index had finished of its own are kept in {home}/runs/x' in said
    monkeypatch.setenv('EHR_R1_DEBUG', '1')
    assert main([*WORDS, 'index']) == 1
    assert 'in fails' in capsys.readouterr().err

@pytest.mark.parametrize('error, lines', [
    (InferenceError('127.0.0.1:9 does not answer; is it up?'), 2),
    (Refused('nothing was sent'), 1),
    (ValueError('no'), 1)])
def test_what_is_kept_is_said_where_another_try_can_help(home, told, monkeypatch, error, lines):
    def fails(r):
        raise error
    monkeypatch.setitem(pipeline.STAGES, 'index', fails)
    code, said = told(*FIRST)
    assert code == 1
    assert said.startswith(f'{type(error).__name__}: {error}')
    assert len(said.splitlines()) == lines

# --- places

def test_home_that_is_a_file(home, told, monkeypatch):
    (home/'file').write_text('')
    monkeypatch.setenv('EHR_R1_HOME', str(home/'file'))
    code, said = told('hospital')
    assert code == 1
    assert 'a file stands where a folder is needed' in said

def test_name_of_a_run_that_is_too_long(told):
    code, said = told('hospital', 'run=' + 'a'*(LONGEST_NAME + 1))
    assert code == 1
    assert 'give a shorter one, run=NAME' in said

@pytest.mark.parametrize('field', ['patients', 'shard_patients', 'workers'])
def test_none_of_what_there_must_be_one(field):
    with pytest.raises(ValueError, match=f'{field}=0: must be at least 1'):
        profile('smoke', **{field: '0'})

FULL = 'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))'
FEW = 'resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))'

@pytest.mark.parametrize('spoil, says', [(FULL, 'a file may not grow any further'), (FEW, 'too many files are open')])
def test_limits_of_the_shell(home, spoil, says):
    code, said = ended(start(*FIRST, spoil=spoil))
    assert code == 1
    assert says in said
    assert 'the same command goes on from there' in said
    assert main([*WORDS, *FIRST]) == 0

def mounted(folder, size):
    "A disk of this size in a folder, or a skip."
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip('this user may not mount a small disk')
    return folder

@pytest.fixture
def disk(tmp_path, monkeypatch):
    "A small disk that is EHR_R1_HOME."
    folder = mounted(tmp_path/'disk', '1500k')
    monkeypatch.setenv('EHR_R1_HOME', str(folder))
    yield folder
    subprocess.run(['umount', str(folder)], check=True)

def remount(disk, how):
    subprocess.run(['mount', '-o', f'remount,{how}', str(disk)], check=True)

def test_full_disk_and_going_on_with_room(disk, told, monkeypatch):
    monkeypatch.setenv('EHR_R1_HOME', str(disk))
    code, said = told(*FIRST, 'patients=40', 'shard_patients=5')
    assert (code, said.split(':')[0]) == (1, 'NoRoom')
    monkeypatch.setenv('EHR_R1_ROOM', 'ignore')
    code, said = told(*FIRST, 'patients=40', 'shard_patients=5')
    assert code == 1
    assert 'the disk is full: make room' in said
    remount(disk, 'size=20m')
    assert told(*FIRST, 'patients=40', 'shard_patients=5') == (0, '')

def test_read_only_disk(disk, told, monkeypatch):
    monkeypatch.setenv('EHR_R1_HOME', str(disk))
    remount(disk, 'size=20m')
    assert told(*FIRST)[0] == 0
    remount(disk, 'ro')
    try:
        assert told(*FIRST) == (0, '')  # all is up to date, and nothing is written
        code, said = told('samples')
        assert code == 1
        assert 'the disk is read-only: name another place with EHR_R1_HOME' in said
    finally:
        remount(disk, 'rw')

NOBODY = 'import ehr_r1.data.samples; os.setgroups([]); os.setgid(65534); os.setuid(65534)'

def test_folder_of_somebody_else(home, monkeypatch):
    if os.getuid():
        pytest.skip('only root can become somebody else')
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv('EHR_R1_HOME', folder)
        assert main([*WORDS, *FIRST]) == 0
        assert ended(start(*FIRST, spoil=NOBODY)) == (0, '')  # all is up to date
        code, said = ended(start('samples', spoil=NOBODY))
    assert code == 1
    assert 'no permission: ask for it' in said

# --- processes

KILLS = '''
from joblib import Parallel, delayed
def make(r):
    Parallel(2)(delayed(os.abort)() for _ in range(4))
pipeline.STAGES['index'] = make
'''

def test_killed_worker(home):
    code, said = ended(start(*FIRST, spoil=KILLS))
    assert code == 1
    assert 'a worker was killed, most often because memory ran out: take workers=1' in said
    assert 'in index; finished stages' in said

def test_program_that_was_killed():
    error = subprocess.CalledProcessError(-9, ['/usr/bin/accelerate', 'launch'])
    assert machine_fault(error).startswith('accelerate ended by signal 9')

WAITS = '''
import time
def wait(r):
    open(os.environ['BEGUN'], 'w').close()
    time.sleep(60)
pipeline.STAGES['index'] = wait
'''

@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_in_the_middle_of_a_stage(home, number, code):
    process = start(*FIRST, spoil=WAITS, env=os.environ | dict(BEGUN=str(home/'begun')))
    for _ in range(1200):
        if (home/'begun').exists() or process.poll() is not None:
            break
        time.sleep(.1)
    process.send_signal(number)
    ended_with, said = ended(process)
    assert ended_with == code
    assert said.startswith(f'stopped by {number.name}\nin index; finished stages')
    assert main([*WORDS, *FIRST]) == 0

def test_signals_do_what_they_did_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before

# --- room

def test_room_is_looked_at_before_anything_runs(home, told, monkeypatch):
    monkeypatch.setattr(machine, 'free_bytes', lambda folder: 1_000)
    code, said = told('hospital')
    assert code == 1
    assert 'make room' in said
    assert not (home/'runs').exists()
    with pytest.raises(NoRoom):
        check_room(dict(index=2e3), home)
    monkeypatch.setenv('EHR_R1_ROOM', 'ignore')
    assert told('hospital') == (0, '')

def test_what_stands_needs_no_room(home, capsys):
    assert main([*WORDS, *FIRST]) == 0
    assert 'disk: up to ' in capsys.readouterr().out
    assert main([*WORDS, *FIRST]) == 0
    assert 'disk:' not in capsys.readouterr().out

def test_estimate_is_no_less_than_what_is_written(home):
    r = Reproduction('smoke', patients=60, run='x', workers=1, model='none')
    needs = pipeline.room_needed(r, ORDER[:4])
    assert main(['profile=smoke', 'patients=60', 'run=x', 'workers=1', 'model=none', *ORDER[:4]]) == 0
    for stage in ORDER[:4]:
        peak = json.loads((getattr(r.run, stage)/'measured.json').read_text())['peak_disk_mb']
        assert peak*2**20 < 1.6*needs[stage] + 2**20, stage

# --- stages

def test_digests_are_not_needed_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path/'a').write_text('a')
    def read_only(path, *args, **kwargs):
        raise OSError(errno.EROFS, 'Read-only file system')
    monkeypatch.setattr('pathlib.Path.write_text', read_only)
    assert fingerprint({'a': tmp_path/'a'}, tmp_path/'memory.json')

def test_known_digests_are_not_written_again(tmp_path):
    (tmp_path/'a').write_text('a')
    memory = tmp_path/'memory.json'
    fingerprint({'a': tmp_path/'a'}, memory)
    before = memory.stat().st_mtime_ns
    fingerprint({'a': tmp_path/'a'}, memory)
    assert memory.stat().st_mtime_ns == before

def test_lock_that_can_be_read_holds(tmp_path, monkeypatch):
    with locked(tmp_path/'index'):
        pass
    def opened(path, mode='r', **kwargs):
        if 'w' in mode:
            raise PermissionError(errno.EACCES, 'Permission denied')
        return open(path, mode, **kwargs)
    monkeypatch.setattr('ehr_r1.stages.open', opened, raising=False)
    with locked(tmp_path/'index'), locked(tmp_path/'nothing there', shared=True):
        pass

class Killed(BaseException):
    "As if the process had ended here."

@pytest.mark.parametrize('at', [1, 2])
def test_whole_result_is_not_thrown_away_whenever_the_process_dies(tmp_path, monkeypatch, at):
    "The last steps of a stage are two renames; the result may have taken days."
    made, rename, calls = [], Path.rename, []

    def make(out):
        made.append(1)
        (out/'data').write_text('x')

    def killed(self, to):
        calls.append(to)
        if len(calls) == at:
            raise Killed
        return rename(self, to)

    folder = tmp_path/'samples'
    build(folder, make, {}, dict(v=1), 'config')
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, 'rename', killed)
        build(folder, make, {}, dict(v=2), 'config')
    assert not build(folder, make, {}, dict(v=2), 'config')
    assert len(made) == 2
    assert not list(tmp_path.glob('samples.*'))

@pytest.fixture
def in_git(tmp_path):
    "Whether git sees a file of a repository in which EHR_R1_HOME lies."
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)

    def sees(path):
        asked = subprocess.run(['git', 'check-ignore', '-q', str(path)], cwd=tmp_path)
        return asked.returncode != 0
    return sees

def test_git_sees_neither_runs_nor_private_reports_wherever_they_lie(tmp_path, in_git):
    run = Run('x', tmp_path/'my home')
    for folder in (run.trajectories, run.private_reports, run.reports, run.folder/'transfer'/'ehrshot'):
        build(folder, lambda out: (out/'a.csv').write_text('1') and {}, {}, {}, 'config')
    assert not in_git(run.trajectories/'a.csv')
    assert not in_git(run.folder/'rating'/'sheet.csv')
    assert not in_git(run.folder/'transfer'/'ehrshot'/'a.csv')
    assert not in_git(run.private_reports/'a.csv')
    assert not in_git(run.private_reports.parent/'another'/'a.csv')
    assert in_git(run.reports/'a.csv')
