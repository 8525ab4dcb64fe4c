"""make test: each step with its time, then one true line of counts. A step that fails does not hide the next."""
import os, subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = 'tests'

def steps(folder):
    "Name and command of each step."
    return {
        'library, notebooks and README in step': [sys.executable, '.ci/in_step.py'],
        'notebooks (nbdev_test)': [BIN/'nbdev_test', '--n_workers', '0', '--timing'],
        'smoke profile, end to end': [BIN/'ehr_r1', 'reproduce', 'profile=smoke', 'run=smoke'],
        'site (warnings are errors)': [sys.executable, 'docs/pages.py', f'{folder}/site'],
        PYTEST: [sys.executable, '-m', 'pytest', '-q', '--durations=10', f'--junitxml={folder}/tests.xml'],
    }

def main():
    "Run the steps; the exit code is 0 when none failed."
    passed, failed, skipped, times = 0, [], 0, {}
    env = {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in steps(folder).items():
            print(f'== {name}', flush=True)
            began = time.monotonic()
            home = {'EHR_R1_HOME': f'{folder}/home'} if name.startswith('smoke') else {}
            ok = subprocess.run([str(c) for c in command], cwd=ROOT, env={**env, **home}).returncode == 0
            times[name] = time.monotonic() - began
            xml = Path(folder)/'tests.xml'
            if name == PYTEST and xml.exists():
                suite = {k: sum(int(s.get(k)) for s in ElementTree.parse(xml).iter('testsuite')) for k in ('tests', 'failures', 'errors', 'skipped')}
                bad = suite['failures'] + suite['errors']
                passed, skipped = passed + suite['tests'] - bad - suite['skipped'], suite['skipped']
                failed += [name]*(bad or (not ok))
            elif ok: passed += 1
            else: failed.append(name)
    for name, seconds in times.items(): print(f'{seconds:7.1f} s  {name}{"  FAILED" if name in failed else ""}')
    if skipped: print(f'{skipped} tests were skipped; pytest -rs says why')
    print(f'{passed} passed, {len(failed)} failed')
    return bool(failed)

if __name__ == '__main__': sys.exit(main())
