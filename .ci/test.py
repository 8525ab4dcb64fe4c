"""make test: each step with its time, the slowest tests by name, then one true line of counts.

Two steps run side by side, each on a core of its own, so that two cores are busy. What a step prints is shown when it
ends; a step that fails does not hide the next.
"""
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = 'tests'


@dataclass
class Result:
    "How a step ended."
    name: str
    ok: bool
    seconds: float


def lanes(folder):
    "Name and command of each step, in two lanes of about the same length."
    python = sys.executable
    junit = f'--junitxml={folder}/tests.xml'
    first = {
        'style (ruff)': [BIN/'ruff', 'check', '.'],
        'library, notebooks and README in step': [python, '.ci/in_step.py'],
        'smoke profile, end to end': [BIN/'ehr_r1', 'reproduce', 'profile=smoke', 'run=smoke'],
        'notebooks (nbdev_test)': [BIN/'nbdev_test', '--n_workers', '0', '--timing'],
        'site (warnings are errors)': [python, 'docs/pages.py', f'{folder}/site'],
    }
    return first, {PYTEST: [python, '-m', 'pytest', '-q', '--durations=10', junit]}


def environment(name, folder):
    "A step's environment: this one's commands first, a thread a process, a folder of its own for the smoke run."
    env = {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1'}
    if name.startswith('smoke'):
        env['EHR_R1_HOME'] = f'{folder}/home'
    return env


def run_step(name, command, folder):
    "Run a step and show what it printed."
    began = time.monotonic()
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=environment(name, folder), text=True, errors='replace',
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = [line.rsplit('\r', 1)[-1] for line in done.stdout.splitlines()]  # of a bar only its end
    print('\n'.join([f'== {name}', *lines]), flush=True)
    return Result(name, done.returncode == 0, time.monotonic() - began)


def run_lane(steps, folder):
    "Run a lane's steps one after the other."
    return [run_step(name, command, folder) for name, command in steps.items()]


def tests_counted(folder):
    "Tests that passed, failed and were skipped; None where pytest wrote no result."
    file = Path(folder)/'tests.xml'
    if not file.exists():
        return None
    suites = list(ElementTree.parse(file).iter('testsuite'))
    total, failures, errors, skipped = (sum(int(suite.get(key)) for suite in suites)
                                        for key in ('tests', 'failures', 'errors', 'skipped'))
    failed = failures + errors
    return total - failed - skipped, failed, skipped


def main():
    "Run the lanes; the exit code is 0 when no step failed."
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_lane, lane, folder) for lane in lanes(folder)]
        results = [result for future in futures for result in future.result()]
        counted = tests_counted(folder)
    for result in results:
        print(f"{result.seconds:7.1f} s  {result.name}{'' if result.ok else '  FAILED'}")
    passed = sum(result.ok for result in results if result.name != PYTEST)
    failed = sum(not result.ok for result in results)
    if counted:
        passed += counted[0]
        failed += counted[1] - (counted[1] > 0)  # the step itself is counted once already
        if counted[2]:
            print(f'{counted[2]} tests were skipped; pytest -rs says why')
    print(f'{passed} passed, {failed} failed')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
