"The whole path: same bytes whatever the order, the number of workers, or how often it was killed."
import hashlib, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import polars as pl, pytest
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.data.samples import SETS, build_samples, scan_samples
from ehr_r1.data.tables import TableError, open_source
from ehr_r1.data.tasks import TASKS, build_index
from ehr_r1.data.trajectories import build_trajectories, count_rows, read_patient, scan_store
from ehr_r1.pipeline import Reproduction, main

def digests(folder, *without):
    "Relative path -> digest of every file, measured times aside."
    return {str(f.relative_to(folder)): hashlib.md5(f.read_bytes()).hexdigest() for f in sorted(Path(folder).rglob('*')) if f.is_file() and f.name not in ('measured.json', 'fingerprints.json', 'fingerprints-knowledge.json', *without)}

def prepare(tables, home, **settings):
    p, run = profile('smoke', shard_patients=20, **settings), Run('t', home)
    build_trajectories(open_source(tables), run, p); build_index(run, p); build_samples(run, p)
    return run

@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hospital')/'tables'
    build_hospital(folder, 60, 7, fmt='csv', workers=1, progress=False)
    return folder

@pytest.fixture(scope='module')
def prepared(tables, tmp_path_factory): return prepare(tables, tmp_path_factory.mktemp('home'), workers=1)

def content(run): return digests(run.folder, 'manifest.json')

def test_shuffled_rows_and_more_workers_change_nothing(tables, prepared, tmp_path):
    shuffled = tmp_path/'tables'; shutil.copytree(tables, shuffled)
    for k, f in enumerate(sorted(shuffled.rglob('*.csv'))):
        if f.parent.name != 'codes': pl.read_csv(f, infer_schema=False).sample(fraction=1, shuffle=True, seed=k).write_csv(f)
    assert content(prepare(shuffled, tmp_path/'home', workers=2)) == content(prepared)

def test_two_runs_give_identical_files(tables, prepared, tmp_path):
    again = prepare(tables, tmp_path, workers=1)
    assert digests(again.folder) == digests(prepared.folder)

def test_a_changed_parameter_reruns_what_depends_on_it_and_nothing_else(tables, prepared, tmp_path):
    home = tmp_path/'home'; shutil.copytree(prepared.folder.parent.parent, home)
    run, source = Run('t', home), open_source(tables)
    p, q = profile('smoke', shard_patients=20, workers=1), profile('smoke', shard_patients=20, workers=1, style='official')
    assert not build_trajectories(source, run, p) and not build_index(run, p) and not build_samples(run, p)
    assert not build_trajectories(source, run, q) and not build_index(run, q) and build_samples(run, q)

def test_a_changed_input_reruns_everything(tables, prepared, tmp_path):
    home, changed = tmp_path/'home', tmp_path/'tables'
    shutil.copytree(prepared.folder.parent.parent, home); shutil.copytree(tables, changed)
    f = changed/'hosp'/'services.csv'; f.write_text(f.read_text().replace('MED', 'CMED', 1))
    run, p = Run('t', home), profile('smoke', shard_patients=20, workers=1)
    assert build_trajectories(open_source(changed), run, p) and build_index(run, p) and build_samples(run, p)

def test_every_task_has_samples_and_no_patient_is_in_both_sets(prepared):
    assert {t for t, c in read_manifest(prepared.index)['counts']['tasks'].items() if not c['rows']} == set()
    ins, bench = (set(scan_samples(prepared, s).select('subject_id').collect().to_series()) for s in SETS)
    assert ins and bench and not ins & bench

def test_store_counts_agree_with_the_tables(tables, prepared):
    counts = count_rows(prepared.trajectories)
    for t in ('admissions', 'labevents', 'chartevents', 'diagnoses_icd', 'triage'):
        assert counts['tables'][t]['rows'] == open_source(tables).rows(t), t
    first = scan_store(prepared.trajectories).filter(pl.col('event') == 0).select('table').unique().collect()
    assert first['table'].to_list() == ['patients']
    one = scan_store(prepared.trajectories).select(pl.col('subject_id').first()).collect().item()
    assert read_patient(prepared.trajectories, one)['event'].is_sorted()
    with pytest.raises(KeyError, match='no patient 5'): read_patient(prepared.trajectories, 5)

def test_rows_of_unknown_patients_are_dropped_and_counted(tables, tmp_path):
    changed = tmp_path/'tables'; shutil.copytree(tables, changed)
    f = changed/'hosp'/'patients.csv'; lines = f.read_text().splitlines(); gone = lines.pop(1).split(',')[0]
    f.write_text('\n'.join(lines) + '\n')
    run = Run('t', tmp_path/'home'); build_trajectories(open_source(changed), run, profile('smoke', shard_patients=20))
    dropped = read_manifest(run.trajectories)['counts']['dropped']['subject_id not in patients']
    assert dropped['admissions'] >= 1 and int(gone) not in set(scan_store(run.trajectories).select('subject_id').unique().collect().to_series())

def test_no_patients_is_an_error(tables, tmp_path):
    changed = tmp_path/'tables'; shutil.copytree(tables, changed)
    f = changed/'hosp'/'patients.csv'; f.write_text(f.read_text().splitlines()[0] + '\n')
    with pytest.raises(TableError, match='patients'): build_trajectories(open_source(changed), Run('t', tmp_path/'home'), profile('smoke'))

def test_a_fault_in_a_table_stops_before_anything_is_replaced(tables, prepared, tmp_path):
    home, changed = tmp_path/'home', tmp_path/'tables'
    shutil.copytree(prepared.folder.parent.parent, home); shutil.copytree(tables, changed)
    f = changed/'hosp'/'labevents.csv'; lines = f.read_text().splitlines(); cells = lines[40].split(','); cells[9] = 'x1'; lines[40] = ','.join(cells)
    f.write_text('\n'.join(lines) + '\n')
    run = Run('t', home); before = digests(run.trajectories)
    with pytest.raises(TableError, match=r'labevents(.|\n)*40'): build_trajectories(open_source(changed), run, profile('smoke', shard_patients=20, workers=1))
    assert digests(run.trajectories) == before

def test_stages_in_the_wrong_order_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='trajectories'): build_index(Run('t', tmp_path), profile('smoke'))

def test_words_of_the_command(capsys):
    assert main(['reproduce', 'sed=7']) == 1 and "no setting 'sed'" in capsys.readouterr().err
    assert main(['nonsense']) == 2 and main([]) == 2 and main(['--help']) == 0
    assert main(['hospital', 'profile=paper']) == 1 and 'DATA' in capsys.readouterr().err
    assert Reproduction('demo', 'x/mimic-iv-demo-2.2', protocol='official', caps='none').run.name == 'demo.mimic-iv-demo-2.2.caps-none.protocol-official'
    assert Reproduction('smoke', workers='1').run.name == 'smoke'

COMMAND = [sys.executable, '-c', 'import sys; from ehr_r1.pipeline import main; sys.exit(main())', 'hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains', 'baselines',
           'scores', 'profile=smoke', 'patients=60', 'shard_patients=20', 'replicates=20', 'run=k']
MOMENTS = ['hospital.partial/key', 'trajectories.partial/parts/emar.json', 'trajectories.partial/shard-00001.parquet', 'index.partial/shard-00000.parquet',
           'samples.partial/shard-00000.done', 'graphs.partial/terms/shard-00001.parquet', 'graphs.partial/lift.parquet', 'graphs.partial/shard-00000.parquet',
           'chains.partial/shard-00000.parquet', 'predictions.partial/key', 'scores.partial/key']

def test_killed_at_many_moments_it_ends_with_the_same_bytes(tmp_path):
    def start(home): return subprocess.Popen(COMMAND, env=os.environ | dict(EHR_R1_HOME=str(home)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    calm, rough = tmp_path/'calm', tmp_path/'rough'
    assert start(calm).wait() == 0
    killed = []
    for moment in MOMENTS:
        process = start(rough); deadline = time.time() + 300
        while process.poll() is None and not (rough/'runs'/'k'/moment).exists() and time.time() < deadline: time.sleep(.002)
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL); killed.append(moment)
        process.wait()
    assert len(killed) >= 5, killed # some moments are too short to hit every time
    assert start(rough).wait() == 0
    assert digests(rough/'runs'/'k') == digests(calm/'runs'/'k') and not list((rough/'runs').rglob('*.partial'))

SLOW = """
import sys, time
from pathlib import Path
from joblib import Parallel, delayed
from ehr_r1.config import build
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

@pytest.mark.parametrize('end', ['whole', 'killed alone', 'killed with its workers'])
def test_a_second_process_waits_for_the_first_or_for_workers_that_outlive_it(end, tmp_path):
    (tmp_path/'slow.py').write_text(SLOW)
    def start(): return subprocess.Popen([sys.executable, tmp_path/'slow.py', tmp_path, 'a'], stdout=subprocess.PIPE, text=True, start_new_session=True,
                                         env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)))
    first, deadline = start(), time.time() + 60
    while not (tmp_path/'busy-a').exists() and time.time() < deadline: time.sleep(.01)
    if end == 'killed alone': first.kill(); first.wait()
    if end == 'killed with its workers': os.killpg(first.pid, signal.SIGKILL); first.wait(); (tmp_path/'go-a').touch()
    second = start(); said = second.stdout.readline()
    (tmp_path/'go-a').touch()
    said += second.communicate()[0]
    made = (tmp_path/'log').read_text().split()
    if end == 'whole': assert '[True]' in first.communicate()[0]
    if end == 'killed with its workers': assert 'another' not in said and '[True]' in said and len(made) == 2 # begun anew
    else: assert 'a: another process is at work on it' in said and '[False]' in said and len(made) == 1
