"""make test: each step with its time, the slowest tests by name, then one true line of counts.

Two steps run side by side, each on a core of its own; who is done takes the next. What a step prints is shown when it
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
PARTS = 8     # of the tests, by file: the last ones are short, so that neither core waits long for the other
SLOWEST = 10  # tests that are named


@dataclass
class Result:
    "How a step ended."
    name: str
    ok: bool
    seconds: float


def steps_of(folder):
    "Name and command of each step, in the order in which they are taken."
    python = sys.executable
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob('tests/test_*.py'))
    pytest = [python, '-m', 'pytest', '-q', '--continue-on-collection-errors']
    tests = {f'tests, part {part + 1} of {PARTS}': [
        *pytest, f'--junitxml={folder}/tests-{part}.xml', *files[part::PARTS]] for part in range(PARTS)}
    return {
        'style (ruff)': [BIN/'ruff', 'check', '.'],
        'library, notebooks and README in step': [python, '.ci/in_step.py'],
        'smoke profile, end to end': [BIN/'ehr_r1', 'reproduce', 'profile=smoke', 'run=smoke'],
        'notebooks (nbdev_test)': [BIN/'nbdev_test', '--n_workers', '0', '--timing'],
        'site (warnings are errors)': [python, 'docs/pages.py', f'{folder}/site'],
        **tests,
    }


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


def suites(folder):
    "What pytest wrote of each part that it could start."
    return [suite for file in sorted(Path(folder).glob('tests-*.xml'))
            for suite in ElementTree.parse(file).iter('testsuite')]


def counted(folder):
    "Tests that passed, failed and were skipped."
    total, failures, errors, skipped = (sum(int(suite.get(key)) for suite in suites(folder))
                                        for key in ('tests', 'failures', 'errors', 'skipped'))
    failed = failures + errors
    return total - failed - skipped, failed, skipped


def print_slowest(folder):
    "The tests that took longest, what they share with others included."
    cases = [case for suite in suites(folder) for case in suite.iter('testcase')]
    slowest = sorted(cases, key=lambda case: -float(case.get('time')))[:SLOWEST]
    for case in slowest:
        print(f"{float(case.get('time')):7.1f} s  {case.get('classname')}: {case.get('name')}")


def main():
    "Run the steps; the exit code is 0 when none failed."
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_step, name, command, folder) for name, command in steps_of(folder).items()]
        results = [future.result() for future in futures]
        passed, failed, skipped = counted(folder)
        print('== slowest tests')
        print_slowest(folder)
    print('== steps')
    for result in results:
        print(f"{result.seconds:7.1f} s  {result.name}{'' if result.ok else '  FAILED'}")
    if skipped:
        print(f'{skipped} tests were skipped; pytest -rs says why')
    bad = [result for result in results if not result.ok]
    counts_itself = [result for result in bad if result.name.startswith('tests') and failed]
    failed += len(bad) - len(counts_itself)  # a part whose tests failed is counted by them
    passed += sum(result.ok for result in results if not result.name.startswith('tests'))
    print(f'{passed} passed, {failed} failed')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
