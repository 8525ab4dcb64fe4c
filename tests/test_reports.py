"The report notebooks: what a template must be, what papermill leaves behind, and what credentialed data must not show."
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import polars as pl
import pytest
from papermill.exceptions import PapermillExecutionError

from ehr_r1.config import Run
from ehr_r1.evaluation.reporting import SMALLEST, Report, readable, run_report, run_reports, suppress
from ehr_r1.pipeline import Reproduction
from ehr_r1.stages import read_manifest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs'/'reports'
TEMPLATES = sorted(FOLDER.glob('[0-9]*.ipynb'))
SETTINGS = dict(profile='smoke', run='r', seed=42)

def text(nb): return '\n'.join(json.dumps(o, ensure_ascii=False) for c in nb.cells for o in c.get('outputs', []))

def template(path, *cells):
    "A report of these cells, the first of which holds the parameters."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, path)
    return path

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A small synthetic hospital, up to its scores; with so few patients some AUROC are undefined."
    r = Reproduction('smoke', run='r', home=tmp_path_factory.mktemp('home'), patients=60, shard_patients=20, replicates=20, ins_per_task=60)
    for stage in ('hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains', 'baselines', 'scores'): getattr(r, stage)()
    return r.home

def copied(home, folder):
    "The run elsewhere, to be changed."
    shutil.copytree(home/'runs', folder/'runs')
    return Run('r', folder)

@pytest.fixture(scope='module')
def reported(home):
    run = Run('r', home)
    assert run_reports(run, FOLDER, SETTINGS, home)
    return run

# -- templates

def test_the_reports_are_these():
    assert [p.stem for p in TEMPLATES] == ['01_cohort', '02_tasks', '03_benchmark', '04_thinking_graphs', '05_training', '06_stages', '07_reasoning',
                                           '08_ehrshot', '09_mimic_cdm', '10_medcalc', '11_trials', '12_ehrmind']

@pytest.mark.parametrize('path', TEMPLATES, ids=lambda p: p.stem)
def test_template_has_parameters_and_no_outputs(path):
    nb = nbformat.read(path, as_version=4)
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    assert [c.source.split(' = ')[0] for c in tagged] == ['profile']
    assert re.findall(r'^(\w+) *=', tagged[0].source, re.M) == list(SETTINGS)
    assert all(not c.outputs and c.execution_count is None for c in nb.cells if c.cell_type == 'code')
    assert nb.metadata.kernelspec.name == 'python3' and nb.metadata.kernelspec.language == 'python'
    assert re.match(r'# .+\n\n> .+', nb.cells[0].source)

# -- running one

def test_unknown_parameter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter sede; .* has seed"): run_report(template(tmp_path/'01.ipynb', 'seed = 1'), tmp_path, dict(sede=2), tmp_path)

def test_template_without_parameters_is_refused(tmp_path):
    path = template(tmp_path/'01.ipynb', 'seed = 1')
    nb = nbformat.read(path, as_version=4); nb.cells[0].metadata = {}; nbformat.write(nb, path)
    with pytest.raises(ValueError, match="'parameters'"): run_report(path, tmp_path, {}, tmp_path)

def test_failing_cell_fails_the_report_and_leaves_nothing(tmp_path):
    (tmp_path/'out').mkdir()
    with pytest.raises(PapermillExecutionError, match='seed 7 is odd'):
        run_report(template(tmp_path/'01.ipynb', 'seed = 2', "assert seed % 2 == 0, f'seed {seed} is odd'"), tmp_path/'out', dict(seed=7), tmp_path)
    assert list((tmp_path/'out').iterdir()) == []

def test_seed_must_be_the_runs(home, tmp_path):
    with pytest.raises(ValueError, match='made with seed 42, not 7'): Report(Run('r', home), tmp_path).about('smoke', 7)

def test_reports_need_templates_and_scores(home, tmp_path):
    with pytest.raises(FileNotFoundError, match='root of the repository'): run_reports(Run('r', home), tmp_path, SETTINGS, home)
    with pytest.raises(FileNotFoundError, match='trajectories'): run_reports(Run('r', tmp_path), FOLDER, SETTINGS, tmp_path)

# -- what comes out

def test_reports_are_whole(reported, home, script):
    names = {p.name for p in reported.reports.iterdir()}
    assert {p.name for p in TEMPLATES} | {'manifest.json', 'measured.json', 'benchmark.png', 'benchmark.csv'} <= names
    for kind in ('png', 'svg'): assert {n for n in names if n.endswith(kind)} >= {f'{n}.{kind}' for n in ('cohort_tables', 'cohort_events', 'tasks_counts', 'benchmark', 'benchmark_risks', 'graphs_counts', 'graphs_lift')}
    assert not [n for n in names if n.startswith('.')] and read_manifest(reported.reports)['counts']['access'] == 'open'
    check = script('.ci/check_commit.py')
    for path in TEMPLATES:
        nb = nbformat.read(reported.reports/path.name, as_version=4)
        said = text(nb)
        assert 'papermill' not in nb.metadata and not any('papermill' in c.metadata for c in nb.cells)
        assert not re.search(r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+', said) and str(home) not in said and sys.prefix not in said
        assert 'stderr' not in {o.get('name') for c in nb.cells for o in c.get('outputs', [])}
        assert check.access([reported.reports/path.name]) == {'open'} and 'run: r (profile smoke, seed 42)' in said
        assert (reported.reports/path.name).stat().st_size < 1024*check.LARGEST

def test_benchmark_table_is_what_the_index_page_reads(reported):
    d = pd.read_csv(reported.reports/'benchmark.csv')
    assert {'system', 'task', 'metric', 'value', 'low', 'high'} <= set(d) and {('logistic', 'f1'), ('ceiling', 'auroc')} <= set(zip(*d[d.task == 'overall'][['system', 'metric']].to_numpy().T))
    scores = pl.read_parquet(reported.scores/'scores.parquet')
    assert len(d) == len(scores) and scores.filter(metric='auroc')['value'].null_count() and d.value.isna().sum() == scores['value'].null_count()

def test_reports_that_are_up_to_date_are_not_made_again(reported, home):
    before = {p.name: p.stat().st_mtime_ns for p in reported.reports.iterdir()}
    assert not run_reports(reported, FOLDER, SETTINGS, home)
    assert {p.name: p.stat().st_mtime_ns for p in reported.reports.iterdir()} == before

def test_another_training_of_the_same_recipe_gives_reports_of_its_own(home, tmp_path, monkeypatch):
    "As where a clone brings the reports of another machine along."
    run, made = copied(home, tmp_path), []
    monkeypatch.setattr('ehr_r1.evaluation.reporting.run_report', lambda template, *rest: made.append(template.name))
    def trained(seconds):
        (run.checkpoints/'base').mkdir(parents=True, exist_ok=True)
        (run.checkpoints/'base'/'manifest.json').write_text(json.dumps(dict(key='the same', counts={})))
        (run.checkpoints/'base'/'metrics.jsonl').write_text(json.dumps(dict(step=1, seconds=seconds, loss=1.)) + '\n')
    def reports(): return run_reports(run, FOLDER, SETTINGS, tmp_path, workers=1)
    trained(1.); assert reports() and not reports() and len(made) == len(TEMPLATES)
    trained(1.); assert not reports()
    trained(2.); assert reports() and len(made) == 2*len(TEMPLATES)

def test_same_run_gives_the_same_bytes(reported, home, tmp_path):
    run_report(FOLDER/'03_benchmark.ipynb', tmp_path, SETTINGS, home)
    made = sorted(p.name for p in tmp_path.iterdir())
    assert len(made) > 8 and [n for n in made if (tmp_path/n).read_bytes() != (reported.reports/n).read_bytes()] == []

def test_nothing_scored_is_said_and_drawn(home, tmp_path):
    run = copied(home, tmp_path)
    path = run.scores/'scores.parquet'
    undefined = pl.when(pl.col('metric').is_in(['auroc', 'auprc'])).then(None)
    pl.read_parquet(path).with_columns(undefined.otherwise(pl.col(c)).alias(c) for c in ('value', 'low', 'high')).filter(pl.col('system') != 'ceiling').write_parquet(path)
    path = run.scores/'comparisons.parquet'
    pl.read_parquet(path).filter(pl.col('metric') == 'f1').write_parquet(path)
    (tmp_path/'out').mkdir()
    run_report(FOLDER/'03_benchmark.ipynb', tmp_path/'out', SETTINGS, tmp_path)
    said = text(nbformat.read(tmp_path/'out'/'03_benchmark.ipynb', as_version=4))
    assert '**Risks.** No risk task could be scored.' in said and '**Decisions.** Over' in said and (tmp_path/'out'/'benchmark_risks.png').exists()

def test_no_knowledge_is_said(home, tmp_path):
    run = copied(home, tmp_path)
    for stage in ('knowledge', 'graphs', 'chains'): shutil.rmtree(getattr(run, stage))
    (tmp_path/'out').mkdir()
    run_report(FOLDER/'04_thinking_graphs.ipynb', tmp_path/'out', SETTINGS, tmp_path)
    assert 'no medical knowledge stood beside the tables' in text(nbformat.read(tmp_path/'out'/'04_thinking_graphs.ipynb', as_version=4))

def test_one_patient_gives_reports_too(tmp_path):
    r = Reproduction('smoke', run='r', home=tmp_path, patients=1, replicates=20)
    for stage in ('hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains', 'baselines', 'scores'): getattr(r, stage)()
    assert read_manifest(r.run.chains)['counts']['variants'] == {} and not len(pl.scan_parquet(r.run.graphs/'shard-*.parquet').collect())
    (tmp_path/'out').mkdir()
    for path in TEMPLATES: run_report(path, tmp_path/'out', SETTINGS, tmp_path)

def test_cases_are_pages_and_ratings_come_back(reported, home, tmp_path):
    pages = [p for p in reported.reports.iterdir() if p.name.startswith('case_')]
    assert len(pages) == 3 and all('passes all filters' in p.read_text() and '✗' not in p.read_text() for p in pages)
    run = copied(home, tmp_path)
    sheet = run.folder/'rating'/'sheet'/'ratings.csv'
    assert sheet.exists() and (sheet.parent/'rating.html').exists()
    rows = pd.read_csv(sheet, dtype=str)
    (run.folder/'rating'/'returned').mkdir()
    for rater, shift in (('ann', 0), ('bob', 1)):
        filled = rows.copy()
        for q in rows.columns[rows.isna().all()]: filled[q] = rater if q == 'rater' else [str(1 + (i + shift*(i % 2)) % 5) for i in range(len(rows))]
        filled.to_csv(run.folder/'rating'/'returned'/f'{rater}.csv', index=False)
    (tmp_path/'out').mkdir()
    run_report(FOLDER/'04_thinking_graphs.ipynb', tmp_path/'out', SETTINGS, tmp_path)
    assert 'kappa' in (tmp_path/'out'/'graphs_agreement.csv').read_text()

# -- credentialed data

def test_suppress_hides_counts_from_1_to_9_and_their_row():
    t = pl.DataFrame(dict(task=list('abcd'), samples=[0, 1, 9, 10], score=[.1, .2, .3, .4], other=[50, 50, 50, None]))
    assert suppress(t, ['samples'], 'open').equals(t)
    s = suppress(t, ['samples', 'other'], 'credentialed')
    assert s.rows() == [('a', 0, .1, 50), ('b', None, None, None), ('c', None, None, None), ('d', 10, .4, None)]

def test_small_counts_of_credentialed_data_stand_nowhere(home, tmp_path):
    run = copied(home, tmp_path)
    manifest = json.loads((run.trajectories/'manifest.json').read_text()); manifest['counts'] |= dict(access='credentialed', source='unknown')
    (run.trajectories/'manifest.json').write_text(json.dumps(manifest))
    assert run_reports(run, FOLDER, SETTINGS, tmp_path) and not run.reports.exists()
    out = run.private_reports
    counting = re.compile(r'^(samples|patients|positives|negatives|rows|events|number|yes|no|index|dropped|eligible|windows|cut|evidence|concepts|graphs|chains|cases|kept|pairs|terms|ehr_(ins|bench).*|(yes|no)_patients|window of .*|patient has .*)$')
    seen, hidden = 0, 0
    for path in out.glob('*.csv'):
        d = pl.read_csv(path, infer_schema_length=None)
        for c in d.columns:
            if not counting.match(c) or not d[c].dtype.is_numeric(): continue
            assert not d.filter(pl.col(c).is_between(1, SMALLEST - 1)).height, f'{path.name}: {c}'
            seen += d[c].count(); hidden += d[c].null_count()
    assert seen > 100 and hidden > 100
    assert not list(out.glob('case_*'))
    scores = pl.read_csv(out/'benchmark.csv', infer_schema_length=None)
    assert scores.filter(pl.col('samples').is_null())['note'].null_count() == scores['samples'].null_count() > 0
    for path in TEMPLATES:
        said = text(nbformat.read(out/path.name, as_version=4))
        assert 'access: credentialed' in said and 'access: open' not in said

def test_small_counts_are_not_told_in_sentences(home, tmp_path):
    report = Report(Run('r', home), tmp_path)
    assert report.count(3) == '3' and report.count(12345) == '12,345'
    report.access = 'credentialed'
    assert [report.count(n) for n in (0, 9, 10)] == ['0', 'fewer than 10', '10']

def test_tables_read_well(home, tmp_path):
    t = Report(Run('r', home), tmp_path).table(pl.DataFrame(dict(task=['a<b', None], rows=[12345, None], first_year=[2110, None], rate=[.12345, None], in_42=[True, False])), 't')
    cells = re.findall(r'<td>(.*?)</td>', readable(t).data)
    assert cells == ['a&lt;b', '12,345', '2110', '0.123', 'yes', '', '', '', '', '']
    assert (tmp_path/'t.csv').read_text() == 'task,rows,first_year,rate,in_42\na<b,12345,2110,0.1235,true\n,,,,false\n'
