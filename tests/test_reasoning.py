"Thinking graphs and chains: nothing hidden becomes evidence, nothing unsupported is kept, nothing is asked twice."
import hashlib, json, os, signal, subprocess, sys, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.data.samples import build_samples, shown_rows
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import build_index
from ehr_r1.data.trajectories import FIELD, build_trajectories
from ehr_r1.synthesis.open_knowledge import build_knowledge
from ehr_r1.synthesis.chains import build_chains, briefs_of, kept_chains, scan_chains
from ehr_r1.synthesis.reasoning import fault_of, verbalise
from ehr_r1.synthesis.support import final_results, read_chain, read_record, support, supported
from ehr_r1.inference.teachers import Refused, TeacherError
from ehr_r1.synthesis.graphs import GRAPHED, build_graphs, graph_samples, read_graphs, scan_graphs
from ehr_r1.synthesis.thinking_graph import draw_graph

def made(home, **fields):
    "A small hospital as far as its graphs."
    run, p = Run('r', home), profile('smoke', patients=200, shard_patients=100, **fields)
    if not (home/'tables').exists(): build_hospital(home/'tables', 200, 42, progress=False)
    source = open_source(home/'tables')
    build_trajectories(source, run, p); build_index(run, p); build_samples(run, p)
    build_knowledge(run, home/'tables'/'knowledge'); build_graphs(run, p, source)
    return run, p

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    run, p = made(tmp_path_factory.mktemp('graphs'))
    build_chains(run, p, 'hospital')
    return run, p

def graphs(run): return read_graphs(run, scan_graphs(run).collect())

def test_evidence_is_shown_and_earlier(hospital):
    run, p = hospital
    for file in sorted(run.trajectories.glob('shard-*.parquet')):
        samples, rows = graph_samples(run, file), pl.read_parquet(file)
        shown = shown_rows(rows, samples)
        seen = pl.DataFrame(dict(sample_id=samples['sample_id'].gather(shown['sample']), event=rows['event'].gather(shown['row']))).unique()
        links = pl.read_parquet(run.graphs/file.name).explode('links').unnest('links').join(samples.select('sample_id', 'prediction_time', 'trigger'), on='sample_id')
        assert len(links) and not len(links.join(seen, on=['sample_id', 'event'], how='anti'))
        assert (links['event'] < links['trigger']).all() and (links['time'] <= links['prediction_time']).fill_null(True).all()

def test_graphs_obey_the_rules(hospital):
    run, _ = hospital
    lift = pl.read_parquet(run.graphs/'lift.parquet')
    assert (lift['lift'] > 5).all() and (lift['n_history'] >= 5).all() and lift.group_by('task', 'target').len()['len'].max() <= 20
    for g in graphs(run):
        assert g.links and g.task in GRAPHED and {l.target for l in g.links} <= set(g.answers) and all(l.target != l.history for l in g.links)
        for l in g.links: assert 1 <= len(l.paths) <= 10 and all(p[0] == l.history and p[-1] == l.target and len(p) // 2 <= 10 for p in l.paths)
    counts = read_manifest(run.graphs)['counts']['tasks']
    assert all(c['samples'] >= c['evidence'] >= c['concepts'] >= c['graphs'] for c in counts.values())

def test_lift_counts_training_patients_only(hospital):
    run, _ = hospital
    lift = pl.read_parquet(run.graphs/'lift.parquet')
    train = pl.concat([graph_samples(run, f) for f in sorted(run.trajectories.glob('shard-*.parquet'))]).filter(split='train')
    n = dict(train.group_by('task').len().rows())
    assert all(n[t] == k for t, k in lift.select('task', 'n').unique().rows())

def test_pairs_counted_by_hand(hospital):
    run, _ = hospital
    samples = [r for f in sorted(run.samples.glob('ehr_ins/shard-*.parquet')) for r in pl.read_parquet(f).filter(task='medrecon', split='train').iter_rows(named=True)]
    lines = [{l.removeprefix('- ') for l in r['messages'][1]['content'].splitlines()} for r in samples]
    same = 0
    for pair in pl.read_parquet(run.graphs/'lift.parquet').filter(task='medrecon').iter_rows(named=True):
        shows = [pair['history'] in l for l in lines] # terms that fill a line of their own, such as a diagnosis
        if not any(shows): continue
        both = sum(s and pair['target'] in r['label'] for s, r in zip(shows, samples))
        assert both <= pair['n_pair'] and pair['n'] == len(samples)
        assert abs(pair['lift'] - pair['n_pair']*pair['n']/(pair['n_target']*pair['n_history'])) < 1e-9
        same += both == pair['n_pair'] and sum(shows) == pair['n_history']
    assert same > 3

def test_verbaliser_passes(hospital):
    run, _ = hospital
    for variant, c in read_manifest(run.chains)['counts']['variants'].items():
        tasks = c['tasks'].values()
        assert sum(t['kept'] for t in tasks) >= .95*sum(t['answers'] for t in tasks) and sum(t['answers'] for t in tasks) > 300
        assert sum(t['supported'] for t in tasks) == sum(t['lines'] for t in tasks)
        assert (sum(t['lines'] for t in tasks) > 0) == (variant != 'no_sections')

def test_official_style_passes_too(tmp_path):
    run, p = made(tmp_path, protocol='official', style='official')
    build_chains(run, p, 'hospital')
    tasks = read_manifest(run.chains)['counts']['variants']['knowledge']['tasks'].values()
    assert sum(t['kept'] for t in tasks) >= .95*sum(t['answers'] for t in tasks) > 0
    assert sum(t['supported'] for t in tasks) == sum(t['lines'] for t in tasks) > 0

def test_what_is_not_in_the_record_is_refused(hospital):
    run, p = hospital
    refused = 0
    for r in kept_chains(run).head(200).collect().iter_rows(named=True):
        shard = f"shard-{r['subject_id'] % 2:05d}.parquet"
        if refused > 60: break
        case = next(c for c in cases_of(run, scan_graphs(run).filter(sample_id=r['sample_id']).collect(), shard, p.style))
        events, gold = read_record(case.record, case.style), list(case.answers)
        assert fault_of(r['chain'], gold, events, 'knowledge') == ''
        first = r['chain'].splitlines()[1]
        head, found = first.split('**: ', 1)
        for false in (first + ' with a lactate of 87.3', head + '**: Xylophone reading', first.replace('[21', '[23'), f'{head}**: "{found[::-1]}"'):
            if false == first: continue # an event without a time
            assert not supported(false, events), false
            assert fault_of(r['chain'].replace(first, false), gold, events, 'knowledge') == 'evidence that the record does not show'
            refused += 1
        assert fault_of(r['chain'].replace(' follows.', ' is the ground truth.'), gold, events, 'knowledge') == 'betrays that the answer was given'
    assert refused > 60

@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list('#* []:"-\n\r\0é12.Labs<')), max_size=300))
def test_hostile_chains_never_raise(text):
    events = read_record('## Labs [2150-01-01 00:00]\n- Sodium 1 mEq/L' + text, 'compact')
    for variant in ('knowledge', 'no_sections'): assert isinstance(fault_of(text, ['Sodium'], events, variant), str)
    read_chain(text); final_results(text); support(text, events)

def test_a_huge_chain_is_judged_in_time():
    events = read_record('## Labs [2150-01-01 00:00]\n- Sodium 1 mEq/L', 'compact')
    begun = time.monotonic()
    for text in ('## Extraction\n' + '**' * 500_000, '## Extraction\n' + '**Labs [' * 100_000, '"' * 1_000_000, '1.' * 500_000, ' ' * 1_000_000 + '## Final Results'):
        assert fault_of(text, ['Sodium'], events, 'knowledge')
    assert time.monotonic() - begun < 10

def test_workers_and_repetition_change_nothing(hospital, tmp_path):
    run, p = hospital
    other, q = made(tmp_path, workers=1)
    build_chains(other, q, 'hospital')
    for stage in ('graphs', 'chains'):
        a, b = getattr(run, stage), getattr(other, stage)
        names = sorted(f.name for f in a.glob('*.parquet'))
        assert names and all((a/n).read_bytes() == (b/n).read_bytes() for n in names)
    assert not build_graphs(other, q, open_source(tmp_path/'tables')) and not build_chains(other, q, 'hospital')

def test_pictures_hold_no_markup_of_the_record(hospital):
    run, _ = hospital
    g = graphs(run)[0]
    evil = replace(g.links[0], history='<script>x</script>', paths=(('<script>x</script>', '—a→', g.links[0].target),))
    assert '<script>' not in draw_graph(replace(g, links=(evil,)))

# a teacher behind a server

class Model(BaseHTTPRequestHandler):
    "Answers every question in its own way, slowly, and remembers what it was asked."
    asked, answered = [], []
    protocol_version = 'HTTP/1.1'
    def do_POST(self):
        body = self.rfile.read(size := int(self.headers['content-length']))
        if len(body) < size: return # who asked was killed while it did
        key = hashlib.sha1(body).hexdigest(); self.asked.append(key)
        time.sleep(.02)
        reply = json.dumps(dict(id=key, object='chat.completion', created=0, model='m', choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=f'## Reasoning\n{key}'))],
                                usage=dict(prompt_tokens=7, completion_tokens=5, total_tokens=12))).encode()
        self.send_response(200); self.send_header('content-type', 'application/json'); self.send_header('content-length', str(len(reply))); self.end_headers()
        self.wfile.write(reply); self.answered.append(key)
    def log_message(self, *args): pass

@pytest.fixture
def model():
    Model.asked, Model.answered = [], []
    server = ThreadingHTTPServer(('127.0.0.1', 0), Model)
    server.handle_error = lambda *args: None # a killed client is what this is about
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1'
    server.shutdown()

ASK = '''
import sys
from ehr_r1.config import Run, profile
from ehr_r1.synthesis.reasoning import build_chains
build_chains(Run('r', sys.argv[1]), profile('smoke', patients=200, shard_patients=100, teacher='server', chains_per_task=2, variants='knowledge'), 'hospital')
'''

def test_killed_stage_goes_on_without_asking_again(hospital, model, tmp_path, monkeypatch):
    import shutil
    run, _ = hospital
    (tmp_path/'runs'/'r').mkdir(parents=True)
    for stage in ('samples', 'graphs'): shutil.copytree(getattr(run, stage), tmp_path/'runs'/'r'/stage)
    env = os.environ | dict(EHR_R1_TEACHER_URL=model, EHR_R1_TEACHER_MODEL='m')
    process = subprocess.Popen([sys.executable, '-c', ASK, str(tmp_path)], env=env, stderr=subprocess.DEVNULL)
    while len(Model.answered) < 60 and process.poll() is None: time.sleep(.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL); process.wait()
    before = len(Model.answered)
    record = tmp_path/'runs'/'r'/'teachers'/'server.jsonl'
    kept = len(record.read_text().splitlines())
    subprocess.run([sys.executable, '-c', ASK, str(tmp_path)], env=env, check=True, stderr=subprocess.DEVNULL)
    again = Run('r', tmp_path)
    chains = scan_chains(again).collect()
    assert len(chains) == len(set(Model.asked)) > before # one answer each
    assert len(Model.asked) - len(set(Model.asked)) <= before - kept + 16 # only what was under way when it was killed
    assert len(record.read_text().splitlines()) == len(chains) and (chains['fault'] != '').all()
    assert chains.group_by('sample_id').len()['len'].unique().to_list() == [5] # three, and two further tries
    asked = len(Model.asked)
    shutil.rmtree(again.chains)
    subprocess.run([sys.executable, '-c', ASK, str(tmp_path)], env=env, check=True, stderr=subprocess.DEVNULL)
    assert len(Model.asked) == asked and scan_chains(again).collect().equals(chains)
    monkeypatch.setenv('EHR_R1_TEACHER_RECORD', str(record)) # and once more from the record alone
    build_chains(again, profile('smoke', patients=200, shard_patients=100, teacher='replay', chains_per_task=2, variants='knowledge'), 'hospital')
    assert len(Model.asked) == asked and scan_chains(again).collect().equals(chains)

def test_credentialed_text_stays_here(hospital, monkeypatch, tmp_path):
    import shutil
    run, p = hospital
    other = Run('r', tmp_path); other.folder.mkdir(parents=True)
    for stage in ('samples', 'graphs'): shutil.copytree(getattr(run, stage), getattr(other, stage))
    manifest = other.samples/'manifest.json'
    m = json.loads(manifest.read_text()); m['counts']['access'] = 'credentialed'; manifest.write_text(json.dumps(m))
    monkeypatch.setenv('EHR_R1_TEACHER_MODEL', 'm'); monkeypatch.setenv('EHR_R1_TEACHER_URL', 'https://api.example.org/v1')
    with pytest.raises(Refused, match='mimic-iv-3.1@api.example.org'): build_chains(other, replace(p, teacher='server'), 'mimic-iv-3.1')
    assert not other.chains.exists()
    build_chains(other, p, 'mimic-iv-3.1') # the verbaliser sends nothing

def test_a_teacher_needs_its_settings(hospital, monkeypatch):
    run, p = hospital
    monkeypatch.delenv('EHR_R1_TEACHER_MODEL', raising=False)
    with pytest.raises(TeacherError, match='EHR_R1_TEACHER_MODEL'): build_chains(run, replace(p, teacher='server'), 'hospital')
