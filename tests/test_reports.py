"The report notebooks: what a template must be, what papermill leaves behind, and what credentialed data must not show."
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import polars as pl
import pytest
from papermill.exceptions import PapermillExecutionError

from ehr_r1.config import Run
from ehr_r1.evaluation.reporting import SMALLEST, STYLE, Report, mailed, readable, run_report, run_reports, suppress
from ehr_r1.pipeline import Reproduction
from ehr_r1.stages import read_manifest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs'/'11_reports'
TEMPLATES = sorted(FOLDER.glob('[0-9]*.ipynb'))
NAMES = [
    '00_ledger', '01_cohort', '02_tasks', '03_benchmark', '04_thinking_graphs', '05_training', '06_stages',
    '07_reasoning', '08_ehrshot', '09_mimic_cdm', '10_medcalc', '11_trials', '12_ehrmind', '13_models', '14_groups']
FIGURES = (
    'cohort_tables', 'cohort_events', 'tasks_counts', 'benchmark', 'benchmark_risks', 'graphs_counts', 'graphs_lift')
SETTINGS = dict(profile='smoke', run='r', seed=42)
UP_TO_SCORES = (
    'hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains', 'baselines', 'scores')
LOCAL_PATH = re.compile(r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+')
COUNTING = re.compile(
    r'samples|patients|positives|negatives|rows|events|number|yes|no|index|dropped|eligible|windows|cut|evidence|'
    r'concepts|graphs|chains|cases|kept|pairs|terms|ehr_(ins|bench).*|(yes|no)_patients|window of .*|patient has .*')


def read_notebook(path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get('outputs', [])]


def text(notebook):
    "All that an executed report shows."
    return '\n'.join(json.dumps(output, ensure_ascii=False) for output in outputs(notebook))


def template(path, *sources):
    "A report of these cells, the first of which holds the parameters."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata['tags'] = ['parameters']
    kernel = dict(name='python3', display_name='Python 3', language='python')
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A small synthetic hospital, up to its scores; with so few patients some AUROC are undefined."
    sizes = dict(patients=60, shard_patients=20, replicates=20, ins_per_task=60)
    r = Reproduction('smoke', run='r', home=tmp_path_factory.mktemp('home'), **sizes)
    with pytest.MonkeyPatch.context() as patch:  # with sixty patients no task has thirty answers of each kind
        patch.setattr('ehr_r1.intervals.ENOUGH', 1)
        r.make(*UP_TO_SCORES)
    return r.run.folder.parent.parent


def copied(home, folder):
    "The run elsewhere, to be changed."
    shutil.copytree(home/'runs', folder/'runs')
    return Run('r', folder)


def execute(name, home):
    "One report in a folder of its own."
    out = home/'out'
    out.mkdir()
    run_report(FOLDER/f'{name}.ipynb', out, SETTINGS, home)
    return out


@pytest.fixture(scope='module')
def reported(home):
    run = Run('r', home)
    assert run_reports(run, FOLDER, SETTINGS, home)
    return run


# -- templates

def test_the_reports_are_these():
    assert [path.stem for path in TEMPLATES] == NAMES


def stem(path):
    return path.stem


every_template = pytest.mark.parametrize('path', TEMPLATES, ids=stem)


@every_template
def test_template_has_parameters(path):
    cells = read_notebook(path).cells
    tagged = [cell.source for cell in cells if 'parameters' in cell.metadata.get('tags', [])]
    assert [source.split(' = ')[0] for source in tagged] == ['profile']
    own = ['beside']*(path.stem == '13_models')  # other runs, named by hand
    assert re.findall(r'^(\w+) *=', tagged[0], re.M) == [*SETTINGS, *own]


@every_template
def test_template_has_no_outputs(path):
    for cell in read_notebook(path).cells:
        if cell.cell_type == 'code':
            assert not cell.outputs
            assert cell.execution_count is None


@every_template
def test_template_is_for_python_3(path):
    kernel = read_notebook(path).metadata.kernelspec
    assert kernel.name == 'python3'
    assert kernel.language == 'python'


@every_template
def test_template_begins_with_title_and_summary(path):
    first = read_notebook(path).cells[0]
    assert re.match(r'# .+\n\n> .+', first.source)


# -- running one

def test_unknown_parameter_is_refused(tmp_path):
    path = template(tmp_path/'01.ipynb', 'seed = 1')
    with pytest.raises(ValueError, match='no parameter sede; .* has seed'):
        run_report(path, tmp_path, dict(sede=2), tmp_path)


def test_template_without_parameters_is_refused(tmp_path):
    path = template(tmp_path/'01.ipynb', 'seed = 1')
    notebook = read_notebook(path)
    notebook.cells[0].metadata = {}
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match="'parameters'"):
        run_report(path, tmp_path, {}, tmp_path)


def test_failing_cell_fails_the_report_and_leaves_nothing(tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    path = template(tmp_path/'01.ipynb', 'seed = 2', "assert seed % 2 == 0, f'seed {seed} is odd'")
    with pytest.raises(PapermillExecutionError, match='seed 7 is odd'):
        run_report(path, out, dict(seed=7), tmp_path)
    assert list(out.iterdir()) == []


def test_seed_must_be_the_runs(home, tmp_path):
    report = Report(Run('r', home), tmp_path)
    with pytest.raises(ValueError, match='made with seed 42, not 7'):
        report.about('smoke', 7)


def test_reports_need_templates(home, tmp_path):
    with pytest.raises(FileNotFoundError, match='root of the repository'):
        run_reports(Run('r', home), tmp_path, SETTINGS, home)


def test_reports_need_scores(tmp_path):
    with pytest.raises(FileNotFoundError, match='trajectories'):
        run_reports(Run('r', tmp_path), FOLDER, SETTINGS, tmp_path)


# -- what comes out

def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_reports_and_manifest_stand_in_the_folder(reported):
    names = names_in(reported.reports)
    assert {path.name for path in TEMPLATES} <= names
    assert {'manifest.json', 'measured.json', 'benchmark.png', 'benchmark.csv'} <= names
    assert not [name for name in names if name.startswith('.')]
    assert read_manifest(reported.reports)['counts']['access'] == 'open'


@pytest.mark.parametrize('kind', ['png', 'svg'])
def test_figures_stand_in_the_folder(reported, kind):
    assert names_in(reported.reports) >= {f'{name}.{kind}' for name in FIGURES}


@every_template
def test_report_shows_its_run(reported, path):
    said = text(read_notebook(reported.reports/path.name))
    assert 'run: r (profile smoke, seed 42)' in said


@every_template
def test_report_keeps_nothing_of_papermill(reported, path):
    notebook = read_notebook(reported.reports/path.name)
    assert 'papermill' not in notebook.metadata
    assert not any('papermill' in cell.metadata for cell in notebook.cells)


@every_template
def test_report_shows_no_path_of_this_computer(reported, home, path):
    said = text(read_notebook(reported.reports/path.name))
    assert not LOCAL_PATH.search(said)
    assert str(home) not in said
    assert sys.prefix not in said


@every_template
def test_report_shows_no_warning(reported, path):
    notebook = read_notebook(reported.reports/path.name)
    assert 'stderr' not in {output.get('name') for output in outputs(notebook)}


@every_template
def test_report_may_be_committed(reported, path, script):
    check = script('.ci/check_commit.py')
    made = reported.reports/path.name
    assert check.access(made) == {'open'}
    assert made.stat().st_size < 1024*check.LARGEST


def test_benchmark_table_is_what_the_index_page_reads(reported):
    table = pd.read_csv(reported.reports/'benchmark.csv')
    assert {'system', 'task', 'metric', 'value', 'low', 'high'} <= set(table)
    overall = table[table.task == 'overall']
    scored = set(zip(overall.system, overall.metric))
    assert {('logistic', 'f1'), ('logistic_seen', 'f1'), ('logistic_seen', 'auroc'), ('ceiling', 'auroc')} <= scored


def test_benchmark_table_holds_every_score(reported):
    table = pd.read_csv(reported.reports/'benchmark.csv')
    scores = pl.read_parquet(reported.scores/'scores.parquet')
    assert len(table) == len(scores)
    assert scores.filter(metric='auroc')['value'].null_count()
    assert table.value.isna().sum() == scores['value'].null_count()


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_reports_that_are_up_to_date_are_not_made_again(reported, home):
    before = times_of(reported.reports)
    assert not run_reports(reported, FOLDER, SETTINGS, home)
    assert times_of(reported.reports) == before


def leave_training(run, seconds):
    "A base model of one recipe, trained in that time."
    folder = run.checkpoints/'base'
    folder.mkdir(parents=True, exist_ok=True)
    manifest = dict(key='the same', content='the same', counts={})
    (folder/'manifest.json').write_text(json.dumps(manifest))
    step = dict(step=1, seconds=seconds, loss=1.)
    (folder/'metrics.jsonl').write_text(json.dumps(step) + '\n')


def test_another_training_of_the_same_recipe_gives_reports_of_its_own(home, tmp_path, monkeypatch):
    "As where a clone brings the reports of another machine along."
    run = copied(home, tmp_path)
    made = []

    def pretend(template, *rest):
        made.append(template.name)

    def make_reports():
        return run_reports(run, FOLDER, SETTINGS, tmp_path, workers=1)

    monkeypatch.setattr('ehr_r1.evaluation.reporting.run_report', pretend)
    leave_training(run, 1.)
    assert make_reports()
    assert not make_reports()
    assert len(made) == len(TEMPLATES)
    leave_training(run, 1.)
    assert not make_reports()
    leave_training(run, 2.)
    assert make_reports()
    assert len(made) == 2*len(TEMPLATES)


def test_same_run_gives_the_same_bytes(reported, home, tmp_path):
    run_report(FOLDER/'03_benchmark.ipynb', tmp_path, SETTINGS, home)
    made = sorted(tmp_path.iterdir())
    assert len(made) > 8
    for path in made:
        before = reported.reports/path.name
        assert path.read_bytes() == before.read_bytes(), path.name


def leave_nothing_scored(scores):
    "No AUROC, no AUPRC and no ceiling in a folder of scores."
    path = scores/'scores.parquet'
    of_risks = pl.col('metric').is_in(['auroc', 'auprc'])
    undefined = pl.when(of_risks).then(None)
    numbers = {column: undefined.otherwise(column) for column in ('value', 'low', 'high')}
    others = pl.col('system') != 'ceiling'
    pl.read_parquet(path).with_columns(**numbers).filter(others).write_parquet(path)
    path = scores/'comparisons.parquet'
    pl.read_parquet(path).filter(metric='f1').write_parquet(path)


def test_nothing_scored_is_said_and_drawn(home, tmp_path):
    leave_nothing_scored(copied(home, tmp_path).scores)
    out = execute('03_benchmark', tmp_path)
    said = text(read_notebook(out/'03_benchmark.ipynb'))
    assert '**Risks.** No risk task with enough answers of each kind could be scored.' in said
    assert '**Decisions.** Over' in said
    assert (out/'benchmark_risks.png').exists()


def test_no_knowledge_is_said(home, tmp_path):
    run = copied(home, tmp_path)
    for folder in (run.knowledge, run.graphs, run.chains):
        shutil.rmtree(folder)
    out = execute('04_thinking_graphs', tmp_path)
    said = text(read_notebook(out/'04_thinking_graphs.ipynb'))
    assert 'no medical knowledge stood beside the tables' in said


def test_one_patient_gives_reports_too(tmp_path):
    r = Reproduction('smoke', run='r', home=tmp_path, patients=1, replicates=20)
    r.make(*UP_TO_SCORES)
    assert read_manifest(r.run.chains)['counts']['variants'] == {}
    graphs = pl.scan_parquet(r.run.graphs/'shard-*.parquet')
    assert not len(graphs.collect())
    out = tmp_path/'out'
    out.mkdir()
    for path in TEMPLATES:
        run_report(path, out, SETTINGS, tmp_path)


@pytest.mark.parametrize('base', [2, 10])
def test_numbers_of_logarithmic_axes_are_no_formulas(home, tmp_path, base):
    with matplotlib.rc_context(STYLE):
        figure, ax = plt.subplots()
        ax.plot([1, 1_000], [1, 1_000_000])
        ax.set_xscale('log', base=base)
        ax.set_yscale('log', base=base)
        Report(Run('r', home), tmp_path).figure(figure, 'log')
        ticks = (*ax.get_xticklabels(which='both'), *ax.get_yticklabels(which='both'))
        labels = [label.get_text() for label in ticks]
    plt.close(figure)
    assert '1,000' in labels or '1,024' in labels
    assert not any('$' in label for label in labels)


def test_cases_are_pages(reported):
    pages = [path.read_text() for path in reported.reports.glob('case_*')]
    assert len(pages) == 3
    for page in pages:
        assert 'passes all filters' in page
        assert '✗' not in page


def filled(sheet, rater, shift):
    "A sheet as a rater returns it."
    sheet = sheet.copy()
    empty = sheet.columns[sheet.isna().all()]
    ratings = []
    for row in range(len(sheet)):
        moved = row + shift*(row % 2)
        ratings.append(str(1 + moved % 5))
    for column in empty:
        sheet[column] = rater if column == 'rater' else ratings
    return sheet


def test_the_sheet_of_ratings_stands_beside_its_page(reported):
    folder = reported.folder/'rating'/'sheet'
    assert (folder/'ratings.csv').exists()
    assert (folder/'rating.html').exists()


def test_ratings_come_back(reported, home, tmp_path):
    rating = copied(home, tmp_path).folder/'rating'
    sheet = pd.read_csv(rating/'sheet'/'ratings.csv', dtype=str)
    returned = rating/'returned'
    returned.mkdir()
    for rater, shift in (('ann', 0), ('bob', 1)):
        filled(sheet, rater, shift).to_csv(returned/f'{rater}.csv', index=False)
    out = execute('04_thinking_graphs', tmp_path)
    assert 'kappa' in (out/'graphs_agreement.csv').read_text()


# -- credentialed data

COUNTS = pl.DataFrame(dict(
    task=['a', 'b', 'c', 'd'],
    samples=[0, 1, 9, 10],
    score=[.1, .2, .3, .4],
    other=[50, 50, 50, None]))


def test_suppress_leaves_open_data_alone():
    assert suppress(COUNTS, ['samples'], 'open').equals(COUNTS)


def test_suppress_hides_counts_from_1_to_9_and_their_row():
    hidden = suppress(COUNTS, ['samples', 'other'], 'credentialed')
    assert hidden.rows() == [
        ('a', 0, .1, 50),
        ('b', None, None, None),
        ('c', None, None, None),
        ('d', 10, .4, None)]


@pytest.fixture(scope='module')
def credentialed(home, tmp_path_factory):
    "The private reports of the same run, were it of credentialed data."
    elsewhere = tmp_path_factory.mktemp('credentialed')
    run = copied(home, elsewhere)
    path = run.trajectories/'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['counts'] |= dict(access='credentialed', source='unknown')
    path.write_text(json.dumps(manifest))
    assert run_reports(run, FOLDER, SETTINGS, elsewhere)
    assert not run.reports.exists()
    return run.private_reports


def read_table(path):
    return pl.read_csv(path, infer_schema_length=None)


def counting_columns(table):
    "Those that count people, stays, rows or samples."
    return [column for column in table if COUNTING.fullmatch(column.name) and column.dtype.is_numeric()]


def test_small_counts_of_credentialed_data_stand_nowhere(credentialed):
    seen = hidden = 0
    for path in credentialed.glob('*.csv'):
        for column in counting_columns(read_table(path)):
            small = column.is_between(1, SMALLEST - 1)
            assert not small.any(), f'{path.name}: {column.name}'
            seen += column.count()
            hidden += column.null_count()
    assert seen > 100
    assert hidden > 100


def test_credentialed_data_give_no_case_pages(credentialed):
    assert not list(credentialed.glob('case_*'))


def test_notes_on_suppressed_scores_are_suppressed(credentialed):
    scores = read_table(credentialed/'benchmark.csv')
    suppressed = scores.filter(pl.col('samples').is_null())
    assert len(suppressed) > 0
    assert suppressed['note'].null_count() == len(suppressed)


@every_template
def test_report_on_credentialed_data_says_so(credentialed, path):
    said = text(read_notebook(credentialed/path.name))
    assert 'access: credentialed' in said
    assert 'access: open' not in said


def test_counts_of_open_data_are_told(home, tmp_path):
    report = Report(Run('r', home), tmp_path)
    assert report.count(3) == '3'
    assert report.count(12345) == '12,345'


def test_small_counts_are_not_told_in_sentences(home, tmp_path):
    report = Report(Run('r', home), tmp_path)
    report.access = 'credentialed'
    told = [report.count(number) for number in (0, 9, 10)]
    assert told == ['0', 'fewer than 10', '10']


MIXED = dict(
    task=['a<b', None],
    rows=[12345, None],
    first_year=[2110, None],
    rate=[.12345, None],
    in_42=[True, False])


def test_tables_read_well(home, tmp_path):
    table = Report(Run('r', home), tmp_path).table(pl.DataFrame(MIXED), 't')
    cells = re.findall(r'<td[^>]*>(.*?)</td>', readable(table).data)
    assert cells[:5] == ['a&lt;b', '12,345', '2110', '0.123', 'yes']
    assert cells[5:] == ['', '', '', '', '']


def test_tables_are_written(home, tmp_path):
    Report(Run('r', home), tmp_path).table(pl.DataFrame(MIXED), 't')
    written = (tmp_path/'t.csv').read_text()
    assert written == 'task,rows,first_year,rate,in_42\na<b,12345,2110,0.1235,true\n,,,,false\n'


# -- by hand

@pytest.fixture
def by_hand(home, tmp_path, monkeypatch):
    "A function that has papermill make a small report without our help; its working folder is nbs/."
    monkeypatch.setenv('EHR_R1_HOME', str(home))
    monkeypatch.delenv('EHR_R1_REPORT', raising=False)
    cells = [
        "profile = 'smoke'\nrun = 'r'\nseed = 42",
        'from ehr_r1.config import Run\nfrom ehr_r1.evaluation.reporting import Report\nimport polars as pl',
        'report = Report(Run(run))\nreport.about(profile, seed)',
        'report.table(pl.DataFrame(dict(a=[1])), "by_hand")',
    ]
    path, out = str(template(tmp_path/'01_x.ipynb', *cells)), str(tmp_path/'out.ipynb')
    return partial(papermill.execute_notebook, path, out, cwd='nbs', kernel_name='python3', progress_bar=False)


def test_a_report_made_by_hand_writes_where_all_reports_are(home, by_hand):
    by_hand(parameters=dict(run='r'))
    assert (Run('r', home).reports/'by_hand.csv').exists()
    assert not Path('nbs/by_hand.csv').exists()
    (Run('r', home).reports/'by_hand.csv').unlink()


@pytest.mark.parametrize('parameters, said', [
    (dict(run='q'), "has no run 'q'; there are: r. make reproduce PROFILE=smoke RUN=q makes it"),
    (dict(run='r', sede=7), 'no parameter sede; this report has profile, run, seed'),
    (dict(run='r', seed=7), 'made with seed 42, not 7'),
    (dict(run='r', profile='demo'), 'made with profile smoke, not demo'),
])
def test_a_wrong_parameter_by_hand_stops_and_says_why(by_hand, parameters, said):
    with pytest.raises(PapermillExecutionError, match=re.escape(said)):
        by_hand(parameters=parameters)


def test_a_report_can_be_mailed_as_one_file_that_needs_no_network(reported, tmp_path):
    folder = tmp_path/'mail'
    folder.mkdir()
    shutil.copy(reported.reports/'01_cohort.ipynb', folder)
    page, = mailed(folder)
    text = page.read_text()
    assert 'data:image/png;base64,' in text
    assert 'read_manifest' not in text  # code is folded away
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', text)
