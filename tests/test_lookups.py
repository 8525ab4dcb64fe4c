"""Codes are found however they are spelt, and what is not found is said; names stay whole; empty tasks say why."""
import json
import re
import shutil
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_r1.config import Run
from ehr_r1.data.index import build_index
from ehr_r1.data.lookups import drug_classes, padded_classes, poor_matches, row_keys
from ehr_r1.data.samples import build_samples, scan_samples
from ehr_r1.data.table_reading import one_line
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import TASKS
from ehr_r1.data.trajectories import build_trajectories, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.scoring import parse_answer, set_f1
from ehr_r1.stages import read_manifest

SMOKE = profile('smoke', workers=1)
LINE_BREAK = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029]')


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hospital')/'tables'
    build_hospital(folder, 60, 42, workers=1, progress=False)
    return folder


@pytest.fixture
def spoilt(hospital, tmp_path):
    return shutil.copytree(hospital, tmp_path/'tables')


def change(path, **columns):
    rows = pl.read_csv(path, infer_schema=False)
    rows.with_columns(**columns).write_csv(path.with_suffix(''))
    path.unlink()


def built(folder, home, **overrides):
    "What trajectories and index make of a folder."
    run, p = Run('r', home), profile('smoke', workers=1, **overrides)
    build_trajectories(open_source(folder), run, p)
    build_index(run, p)
    index = pl.read_parquet(sorted(run.index.glob('shard-*.parquet')))
    return SimpleNamespace(run=run, index=index, store=read_manifest(run.trajectories)['counts'],
                           counts=read_manifest(run.index)['counts'])


@pytest.fixture(scope='module')
def good(hospital, tmp_path_factory):
    return built(hospital, tmp_path_factory.mktemp('good'))


# -- spellings of codes

FULL = '00591040610'
SPELLINGS = ['00591-0406-10', '0591-0406-10', '00591-406-10', ' 00591040610 ', '00591 0406 10', '00591.0406.10',
             '591040610.0', '591040610', '0591040610', '00591–0406–10']


@pytest.mark.parametrize('of_row', SPELLINGS)
@pytest.mark.parametrize('of_map', ['00591040610', '0591-0406-10', '00591-0406-10', '591040610', '0591040610'])
def test_a_drug_is_found_however_either_side_writes_its_code(of_row, of_map):
    assert class_of(of_row, {of_map: 'Macrolides'}) == 'Macrolides'


def class_of(code, classes, make=drug_classes):
    lookup = make(pl.DataFrame(dict(ndc_code=list(classes), atc_name=list(classes.values()))))
    rows = pl.LazyFrame({'ndc': [code]}, schema=dict(ndc=pl.String)).with_columns(row_keys([lookup]))
    joined = rows.join(lookup.names, on=lookup.key, how='left').collect()
    assert len(joined) == 1
    return joined['ATC Type'][0]


@pytest.mark.parametrize('dashed, full', [
    ('1234-5678-90', '01234567890'), ('12345-678-90', '12345067890'), ('12345-6789-0', '12345678900')])
def test_each_form_of_ten_digits_is_padded_where_it_is_short(dashed, full):
    assert class_of(dashed, {full: 'here', '99999999999': 'elsewhere'}) == 'here'
    assert class_of(full, {dashed: 'here'}) == 'here'


@pytest.mark.parametrize('none', ['0', '00000000000', '0.0', '0000-0000-00', '', None])
def test_a_code_of_zeros_is_no_drug(none):
    assert class_of(none, {'0': 'nothing', FULL: 'Macrolides'}) is None


def test_ten_digits_that_may_be_two_drugs_are_none():
    classes = {'01234567890': 'one', '12345067890': 'another'}
    assert class_of('1234567890', classes) is None
    assert class_of('1234567890', dict.fromkeys(classes, 'same')) == 'same'
    assert class_of('1234-5678-90', classes) == 'one'


@given(st.from_regex('[0-9]{11}', fullmatch=True).filter(lambda code: code.strip('0')))
def test_eleven_digits_mean_themselves(code):
    other = f'{(int(code) + 1) % 10**11:011}'
    assert class_of(code, {other: 'other', code: 'right'}) == 'right'


def test_official_finds_what_the_released_program_finds():
    assert class_of('591040610.0', {FULL: 'Macrolides'}, padded_classes) == 'Macrolides'
    assert class_of('0591-0406-10', {FULL: 'Macrolides'}, padded_classes) is None


code = pl.col('icd_code')
ICD = {
    'blanks behind': code.str.pad_end(7), 'blanks in front': code.str.pad_start(7),
    'small letters': code.str.to_lowercase(),
    'dots': code.str.replace('^(...)(.)', '$1.$2'), 'dashes': code.str.replace('^(...)(.)', '$1-$2'),
}


@pytest.mark.parametrize('name', ICD)
@pytest.mark.parametrize('side', ['table', 'map'])
def test_icd_codes_are_found_however_either_side_writes_them(spoilt, tmp_path, good, name, side):
    tables = ['hosp/diagnoses_icd', 'hosp/procedures_icd', 'ed/diagnosis']
    maps = ['hosp/d_icd_diagnoses', 'hosp/d_icd_procedures', 'codes/d_ccs_diagnoses', 'codes/d_ccs_procedures']
    for table in tables if side == 'table' else maps:
        change(spoilt/f'{table}.csv.gz', icd_code=ICD[name])
    got = built(spoilt, tmp_path)
    assert got.store['lookups'] == good.store['lookups']
    assert got.index.equals(good.index)


def test_a_version_written_otherwise_is_the_same_version(spoilt, tmp_path, good):
    change(spoilt/'codes'/'d_ccs_diagnoses.csv.gz', icd_version=pl.col('icd_version') + '.0')
    change(spoilt/'codes'/'d_ccs_procedures.csv.gz', icd_version='ICD-' + pl.col('icd_version'))
    assert built(spoilt, tmp_path).index.equals(good.index)


# -- what was found

def test_the_share_of_every_look_up_is_in_manifest_and_terminal(hospital, tmp_path, capsys):
    got = built(hospital, tmp_path)
    matched = got.store['lookups']['prescriptions']['ATC Type']
    assert 0 < matched['matched'] <= matched['rows'] <= got.store['tables']['prescriptions']['rows']
    line, = [line for line in capsys.readouterr().out.splitlines() if 'found their names' in line]
    for table, columns in got.store['lookups'].items():
        for column in columns:
            assert f'{table} {column} ' in line
    assert not poor_matches(got.store['lookups'], 'strict')


def test_less_than_half_is_a_warning_that_names_the_file(spoilt, tmp_path, capsys):
    change(spoilt/'codes'/'d_atc_prescriptions.csv.gz', ndc_code=pl.lit('X') + pl.col('ndc_code'))
    got = built(spoilt, tmp_path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('WARNING')]
    assert len(warnings) == 2  # prescriptions and medrecon
    assert all('codes/d_atc_prescriptions' in line and 'ndc' in line for line in warnings)
    for task in ('prescriptions_atc', 'medrecon_atc'):
        assert 'codes/d_atc_prescriptions' in got.counts['empty'][task]
    build_trajectories(open_source(spoilt), got.run, SMOKE)  # up to date, and still to be known
    assert capsys.readouterr().out.count('WARNING') == 2


# -- names

BROKEN = ['\n', '\r\n', '\x1f', '\x1e', '\u2028', ' \t\n ', '\x0b']


@pytest.mark.parametrize('broken', BROKEN)
def test_a_name_is_the_same_in_store_prompt_label_and_score(spoilt, tmp_path, broken):
    path = spoilt/'hosp'/'prescriptions.csv.gz'
    drugs = pl.read_csv(path, infer_schema=False)['drug'].value_counts(sort=True)['drug']
    name = next(drug for drug in drugs if ' ' in drug)
    change(path, drug=pl.when(pl.col('drug') == name).then(pl.lit(name.replace(' ', broken, 1))).otherwise('drug'))
    change(spoilt/'hosp'/'d_labitems.csv.gz', label=pl.col('label').str.replace(' ', broken))
    got = built(spoilt, tmp_path, caps='none')
    labels = got.index.filter(pl.col('family') == 'decision')['label'].explode()
    assert name in labels.to_list()
    assert not labels.str.contains(LINE_BREAK.pattern).any()
    cells = scan_trajectories(got.run.trajectories).filter(pl.col('table') == 'prescriptions').select('cells').collect()
    assert cells['cells'].str.starts_with(name).any()
    for gold in got.index.filter(pl.col('task') == 'prescriptions')['label'].to_list():
        assert set_f1(gold, parse_answer('\n'.join(gold)).lines) == 1


def test_candidates_and_prompts_have_the_name_in_one_line(spoilt, tmp_path):
    path = spoilt/'hosp'/'prescriptions.csv.gz'
    change(path, drug=pl.col('drug').str.replace(' ', '\n'))
    got = built(spoilt, tmp_path, caps='none', style='compact')
    build_samples(got.run, profile('smoke', workers=1, caps='none', style='compact'))
    rows = scan_samples(got.run, 'ehr_ins').filter(pl.col('task') == 'prescriptions').collect()
    names = {name for label in rows['label'] for name in label if ' ' in name}
    offered = {name for choice in rows['candidates'] for name in choice}
    assert names and names <= offered and not any(map(LINE_BREAK.search, offered))
    shown = '\n'.join(messages[1]['content'] for messages in rows['messages'])
    assert any(f'- {name}' in shown for name in names)
    assert not any(f"- {name.replace(' ', chr(10), 1)}" in shown for name in names)


@given(st.text(st.characters(codec='utf-8')))
def test_one_line_takes_out_what_breaks_and_nothing_else(name):
    mended = pl.select(one_line(pl.lit(name, pl.String))).item()
    assert not LINE_BREAK.search(mended)
    assert mended.split() == LINE_BREAK.sub(' ', name).split()
    if not LINE_BREAK.search(name):
        assert mended == name


# -- tasks without samples

def test_modules_that_are_not_there_are_named_with_their_tasks(spoilt, tmp_path, capsys):
    for module in ('ed', 'note'):
        shutil.rmtree(spoilt/module)
    got = built(spoilt, tmp_path)
    out = capsys.readouterr().out
    missing = [task for task in TASKS.values() if task.trigger in ('medrecon', 'pyxis', 'diagnosis', 'edstays')]
    assert all('no ed/' in got.counts['empty'][task.name] for task in missing)
    assert all('no note/' in got.counts['empty'][task] for task in ('radiology', 'Readmission_30day'))
    assert all(f'no samples of {name}' in out or f', {name}' in out for name in got.counts['empty'])
    assert 'no ed/' in out and 'no note/' in out


def test_every_task_without_rows_has_a_reason(good):
    without = [name for name, count in good.counts['tasks'].items() if not count['rows']]
    assert list(good.counts['empty']) == without


@pytest.mark.parametrize('left, says', [(0, 'no row of icustays has its outtime'), (3, 'not asked for')])
def test_stays_without_an_end_are_counted(spoilt, tmp_path, good, capsys, left, says):
    path = spoilt/'icu'/'icustays.csv.gz'
    change(path, outtime=pl.when(pl.int_range(pl.len()) < left).then('outtime'))
    got = built(spoilt, tmp_path)
    of = got.counts['stays']['icustays']
    assert of['rows'] - of['without'] == left
    lost = good.index.filter(task='ICU_Stay_7day').height - got.index.filter(task='ICU_Stay_7day').height
    assert lost > 0
    out = capsys.readouterr().out
    assert 'rows of icustays have no outtime' in out
    assert says in out


def test_a_code_map_that_is_not_there_is_named(spoilt, tmp_path):
    (spoilt/'codes'/'d_ccs_procedures.csv.gz').unlink()
    empty = built(spoilt, tmp_path).counts['empty']
    assert empty['procedures_ccs'] == 'CCS Type cannot be looked up: no codes/d_ccs_procedures'


def test_windows_that_fit_no_sample_are_said(hospital, tmp_path, capsys):
    got = built(hospital, tmp_path, window_min=1, window_max=2)
    line, = [line for line in capsys.readouterr().out.splitlines() if 'no window of more than 1' in line]
    assert 'labevents' in line
    shortest, longest = got.counts['windows']['labevents']
    assert 1 <= shortest < longest
    json.dumps(got.counts)
