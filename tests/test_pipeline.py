"The whole path: same bytes whatever the order, the number of workers, or how often it was killed."
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from ehr_r1.command import main
from ehr_r1.config import Run
from ehr_r1.data.index import build_index
from ehr_r1.data.samples import build_samples, scan_samples
from ehr_r1.data.sampling import SETS
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories, count_rows, read_trajectory, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.pipeline import Reproduction
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest

MEASURED = ('measured.json', 'fingerprints.json', 'fingerprints-knowledge.json')


def digests(folder, *without):
    "Relative path -> digest of every file; times, remembered digests of inputs and locks aside."
    found = {}
    for file in sorted(Path(folder).rglob('*')):
        is_aside = file.name in (*MEASURED, *without) or file.name.startswith('.')
        if file.is_file() and not is_aside:
            name = str(file.relative_to(folder))
            found[name] = hashlib.md5(file.read_bytes()).hexdigest()
    return found


def content(run):
    "What a run made, whatever it was made of."
    return digests(run.folder, 'manifest.json')


def settings(**others):
    return profile('smoke', shard_patients=20, **others)


def prepare(tables, home, **others):
    "Run the first stages."
    p, run = settings(**others), Run('t', home)
    build_trajectories(open_source(tables), run, p)
    build_index(run, p)
    build_samples(run, p)
    return run


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hospital')/'tables'
    build_hospital(folder, 60, 7, fmt='csv', workers=1, progress=False)
    return folder


@pytest.fixture(scope='module')
def prepared(tables, tmp_path_factory):
    return prepare(tables, tmp_path_factory.mktemp('home'), workers=1)


@pytest.fixture
def changed(tables, tmp_path):
    "A copy of the tables, to be changed."
    return shutil.copytree(tables, tmp_path/'tables')


@pytest.fixture
def copied(prepared, tmp_path):
    "A copy of the finished run, to be run again."
    shutil.copytree(prepared.folder.parent.parent, tmp_path/'home')
    return Run('t', tmp_path/'home')


# -- the same bytes ----------------------------------------------------------------------------------------------------

def test_shuffled_rows_and_more_workers_change_nothing(changed, prepared, tmp_path):
    for seed, file in enumerate(sorted(changed.rglob('*.csv'))):
        if file.parent.name != 'codes':
            rows = pl.read_csv(file, infer_schema=False)
            rows.sample(fraction=1, shuffle=True, seed=seed).write_csv(file)
    assert content(prepare(changed, tmp_path/'home', workers=2)) == content(prepared)


def test_two_runs_give_identical_files(tables, prepared, tmp_path):
    again = prepare(tables, tmp_path, workers=1)
    assert digests(again.folder) == digests(prepared.folder)


# -- what runs again ---------------------------------------------------------------------------------------------------

def test_nothing_reruns_what_is_up_to_date(tables, copied):
    p = settings(workers=1)
    assert not build_trajectories(open_source(tables), copied, p)
    assert not build_index(copied, p)
    assert not build_samples(copied, p)


def test_a_changed_parameter_reruns_what_depends_on_it_and_nothing_else(tables, copied):
    p = settings(workers=1, style='official')
    assert not build_trajectories(open_source(tables), copied, p)
    assert not build_index(copied, p)
    assert build_samples(copied, p)


def test_a_changed_input_reruns_everything(changed, copied):
    services = changed/'hosp'/'services.csv'
    services.write_text(services.read_text().replace('MED', 'CMED', 1))
    p = settings(workers=1)
    assert build_trajectories(open_source(changed), copied, p)
    assert build_index(copied, p)
    assert build_samples(copied, p)


# -- what is in it -----------------------------------------------------------------------------------------------------

def test_every_task_has_samples(prepared):
    tasks = read_manifest(prepared.index)['counts']['tasks']
    assert [task for task, counts in tasks.items() if not counts['rows']] == []


def test_no_patient_is_in_both_sets(prepared):
    patients = [scan_samples(prepared, name).collect()['subject_id'] for name in SETS]
    ins, bench = map(set, patients)
    assert ins and bench
    assert not ins & bench


@pytest.mark.parametrize('table', ['admissions', 'labevents', 'chartevents', 'diagnoses_icd', 'triage'])
def test_store_counts_agree_with_the_tables(tables, prepared, table):
    counts = count_rows(prepared.trajectories)
    assert counts['tables'][table]['rows'] == open_source(tables).rows(table)


def test_every_trajectory_begins_with_the_patient(prepared):
    first = scan_trajectories(prepared.trajectories).filter(event=0).collect()
    assert first['table'].unique().to_list() == ['patients']


def test_a_patient_is_read_in_order(prepared):
    patient = scan_trajectories(prepared.trajectories).first().collect()['subject_id'].item()
    assert read_trajectory(prepared.trajectories, patient)['event'].is_sorted()


def test_a_patient_who_is_not_there(prepared):
    with pytest.raises(KeyError, match='no patient 5'):
        read_trajectory(prepared.trajectories, 5)


def test_rows_of_unknown_patients_are_dropped_and_counted(changed, tmp_path):
    gone = pl.read_csv(changed/'hosp'/'admissions.csv')['subject_id'][0]
    patients = changed/'hosp'/'patients.csv'
    left = [line for line in patients.read_text().splitlines() if line.split(',')[0] != str(gone)]
    patients.write_text('\n'.join([*left, '']))
    run = Run('t', tmp_path/'home')
    build_trajectories(open_source(changed), run, settings())
    dropped = read_manifest(run.trajectories)['counts']['dropped']['subject_id not in patients']
    kept = scan_trajectories(run.trajectories).collect()['subject_id']
    assert dropped['admissions'] >= 1
    assert gone not in kept.to_list()


# -- what is refused ---------------------------------------------------------------------------------------------------

def test_no_patients_is_an_error(changed, tmp_path):
    patients = changed/'hosp'/'patients.csv'
    header = patients.read_text().splitlines()[0]
    patients.write_text(header + '\n')
    with pytest.raises(TableError, match='patients'):
        build_trajectories(open_source(changed), Run('t', tmp_path/'home'), profile('smoke'))


def test_a_fault_in_a_table_stops_before_anything_is_replaced(changed, copied):
    labs = changed/'hosp'/'labevents.csv'
    lines = labs.read_text().splitlines()
    cells = lines[40].split(',')
    cells[9] = 'x1'
    lines[40] = ','.join(cells)
    labs.write_text('\n'.join(lines) + '\n')
    before = digests(copied.trajectories)
    with pytest.raises(TableError, match=r'labevents(.|\n)*40'):
        build_trajectories(open_source(changed), copied, settings(workers=1))
    assert digests(copied.trajectories) == before


def test_stages_in_the_wrong_order_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='trajectories'):
        build_index(Run('t', tmp_path), profile('smoke'))


# -- the command -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, said', [
    (['reproduce', 'sed=7'], "no setting 'sed'"),
    (['hospital', 'profile=paper'], 'DATA'),
])
def test_a_command_that_cannot_run_says_why(words, said, capsys):
    assert main(words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('words, status', [(['nonsense'], 2), ([], 2), (['--help'], 0)])
def test_a_command_without_a_known_stage(words, status):
    assert main(words) == status


def test_a_run_is_named_after_its_profile_and_what_differs_from_it():
    differs = Reproduction('demo', 'x/mimic-iv-demo-2.2', protocol='official', caps='none')
    assert differs.run.name == 'demo.mimic-iv-demo-2.2.caps-none.protocol-official'


@pytest.mark.parametrize('model', ['Qwen/Qwen3-8B', '/models/qwen3-1.7b', 'C:\\models\\my model'])
def test_a_model_names_a_run_whatever_its_path(model, tmp_path):
    name = Reproduction('paper', '/data/mimic-iv-3.1', model=model, home=tmp_path).run.name
    assert name.startswith('paper.mimic-iv-3.1.model-')
    assert not set(name) & set('/\\ ')


def test_workers_are_not_in_the_name_of_a_run():
    assert Reproduction('smoke', workers='1').run.name == 'smoke'


# -- interrupted -------------------------------------------------------------------------------------------------------

RUN_MAIN = 'import sys; from ehr_r1.command import main; sys.exit(main())'
STAGES = ('hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains')
SMALL = ('profile=smoke', 'patients=45', 'shard_patients=15', 'chains_per_task=10', 'run=k')
MOMENTS = (
    'hospital.partial/key',
    'trajectories.partial/shard-00001.parquet',
    'samples.partial/shard-00000.done',
    'graphs.partial/terms/shard-00001.parquet',
    'chains.partial/shard-00000.parquet',
)


def start(home):
    "Run the stages in a process of its own."
    command = [sys.executable, '-c', RUN_MAIN, *STAGES, *SMALL]
    environment = os.environ | dict(EHR_R1_HOME=str(home))
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, start_new_session=True, **silent)


def killed_at(path, home):
    "Start the stages and kill them once a file is there; False if they ended before."
    process, deadline = start(home), time.time() + 300
    while process.poll() is None and not path.exists() and time.time() < deadline:
        time.sleep(.002)
    is_running = process.poll() is None
    if is_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return is_running


def test_killed_at_many_moments_it_ends_with_the_same_bytes(tmp_path):
    calm, rough = tmp_path/'calm', tmp_path/'rough'
    assert start(calm).wait() == 0
    killed = [moment for moment in MOMENTS if killed_at(rough/'runs'/'k'/moment, rough)]
    assert len(killed) >= 3, killed  # some moments are too short to hit every time
    assert start(rough).wait() == 0
    assert digests(rough/'runs'/'k') == digests(calm/'runs'/'k')
    assert not list((rough/'runs').rglob('*.partial'))


# -- two processes -----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from joblib import Parallel, delayed
from ehr_r1.stages import build
def stage(folder):
    def make(out):
        with open(folder.parent/'log', 'a') as f: f.write('made ')
        (folder.parent/f'busy-{folder.name}').touch()
        while not (folder.parent/f'go-{folder.name}').exists(): time.sleep(.01)
    return build(folder, make, {}, {}, 'config')
if __name__ == '__main__':
    home = Path(sys.argv[1])
    print(Parallel(2)(delayed(stage)(home/n) for n in sys.argv[2:]))
"""


class SlowStage:
    "A stage `a` that works in a worker until it is allowed to end."
    def __init__(self, home):
        self.home = home
        (home/'slow.py').write_text(SLOW)

    def start(self):
        environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent))
        command = [sys.executable, self.home/'slow.py', self.home, 'a']
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)

    def wait_until_busy(self):
        deadline = time.time() + 60
        while not (self.home/'busy-a').exists() and time.time() < deadline:
            time.sleep(.01)

    def let_go(self):
        (self.home/'go-a').touch()

    def times_made(self):
        return len((self.home/'log').read_text().split())


@pytest.fixture
def slow(tmp_path):
    return SlowStage(tmp_path)


@pytest.fixture
def first(slow):
    "A process in the middle of the stage."
    process = slow.start()
    slow.wait_until_busy()
    return process


def said_while_waiting(slow):
    "What a second process says until it ends; the stage is let go once it has said something."
    second = slow.start()
    said = second.stdout.readline()
    slow.let_go()
    return said + second.communicate()[0]


def test_a_second_process_waits_for_the_first(slow, first):
    said = said_while_waiting(slow)
    assert 'a: another process is at work on it' in said
    assert '[False]' in said
    assert '[True]' in first.communicate()[0]
    assert slow.times_made() == 1


def test_a_second_process_waits_for_workers_that_outlive_the_first(slow, first):
    first.kill()
    first.wait()
    said = said_while_waiting(slow)
    assert 'a: another process is at work on it' in said
    assert '[False]' in said
    assert slow.times_made() == 1


def test_a_second_process_begins_anew_where_the_first_was_killed_with_its_workers(slow, first):
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    slow.let_go()
    said = said_while_waiting(slow)
    assert 'another' not in said
    assert '[True]' in said
    assert slow.times_made() == 2
