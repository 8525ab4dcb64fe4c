"The official protocol reads and places rows as the released program does: numbers, the word None, rows without a time."
import gzip
import json
from datetime import timedelta
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from records import at, merged, row, store

from ehr_r1.config import Run
from ehr_r1.data.events import FIELD
from ehr_r1.data.index import index_rows
from ehr_r1.data.row_order import order_rows
from ehr_r1.data.samples import Record
from ehr_r1.data.schema import TABLES
from ehr_r1.data.table_files import TableError
from ehr_r1.data.table_reading import released_numbers, scan
from ehr_r1.data.tables import Source, open_source
from ehr_r1.data.tasks import TASKS, released_instructions, split_question
from ehr_r1.data.trajectories import build_trajectories, merged_rows, stream_to_parts
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.training.examples import shorten

# numbers


def as_pandas(text):
    "The parser of pandas 1.5.3, digit by digit."
    mantissa, _, power = text.lower().partition('e')
    negative, mantissa = mantissa.startswith('-'), mantissa.lstrip('+-')
    whole, _, decimals = mantissa.partition('.')
    number, digits, exponent = 0., 0, int(power or 0)
    for digit in whole:
        if digits < 17:
            number, digits = number*10. + float(digit), digits + 1
        else:
            exponent += 1
    for digit in decimals:
        if digits < 17:
            number, digits, exponent = number*10. + float(digit), digits + 1, exponent - 1
    if negative:
        number = -number
    if exponent > 308:
        return None
    if exponent > 0:
        return number*float(f'1e{exponent}')
    if exponent < -308:
        return number/float(f'1e{min(-308 - exponent, 308)}')/1e308
    return number/float(f'1e{-exponent}')


# what pandas 1.5.3 printed
PRINTED = {
    '89.999997854232788': '89.9999978542328',
    '0.1': '0.1',
    '1e-05': '1e-05',
    '-0.30000000000000004': '-0.3',
    '000000000000000001.5': '0.0',
    '123456789012345678': '1.2345678901234568e+17',
}
DIGITS = st.text('0123456789', max_size=24)
NUMBERS = st.builds(
    lambda sign, whole, decimals, power: f'{sign}{whole or "0"}.{decimals}{power}',
    st.sampled_from(['', '-']), DIGITS, DIGITS,
    st.one_of(st.just(''), st.integers(-330, 290).map('e{}'.format)))


@pytest.mark.parametrize('text, printed', PRINTED.items())
def test_numbers_are_printed_as_pandas_did(text, printed):
    assert repr(as_pandas(text)) == printed
    assert repr(released_numbers(pl.Series([text])).item()) == printed


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_numbers_are_read_digit_by_digit(texts):
    found = released_numbers(pl.Series(texts)).to_list()
    assert list(map(repr, found)) == [repr(as_pandas(text)) for text in texts]


LABS = """\
subject_id,hadm_id,itemid,charttime,storetime,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,comments
7,70,1,2180-05-06 10:00:00,,89.999997854232788,None,3,0.5,,None
7,70,1,2180-05-06 10:00:00,,-1.0000000000000002e-9,N/A,4,,,inf
7,None,1,None,,None,nan,,0.5,abnormal,
"""


def read_labs(folder, protocol, name='labevents.csv', text=LABS):
    "The laboratory results that some text holds."
    path = folder/name
    if name.endswith('.gz'):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return scan(path, TABLES['labevents'], name, protocol=protocol).collect(engine='streaming')


@pytest.mark.parametrize('name', ['labevents.csv', 'labevents.csv.gz'])
def test_both_protocols_read_the_same_text_their_own_way(tmp_path, name):
    official, strict = (read_labs(tmp_path, protocol, name) for protocol in ('official', 'strict'))
    assert official['valuenum'].to_list() == [89.9999978542328, as_pandas('-1.0000000000000002e-9'), None]
    assert strict['valuenum'].to_list() == [89.999997854232788, -1.0000000000000002e-9, None]
    assert official['valuenum'][0] != strict['valuenum'][0]
    assert official['valueuom'].to_list() == ['None', None, None]
    assert strict['valueuom'].to_list() == [None, None, None]
    for column in ('charttime', 'hadm_id'):  # no text: the word is missing to both
        assert official[column].to_list() == strict[column].to_list()


def test_numbers_of_a_parquet_file_stay_as_they_are(tmp_path):
    labs = read_labs(tmp_path, 'strict')
    labs.write_parquet(tmp_path/'labevents.parquet')
    again = scan(tmp_path/'labevents.parquet', TABLES['labevents'], 'labevents.parquet', protocol='official').collect()
    assert again.equals(labs)


def test_parquet_files_of_text_are_read_as_csv_files_are(tmp_path):
    official = read_labs(tmp_path, 'official')
    pl.read_csv(tmp_path/'labevents.csv', infer_schema=False).write_parquet(tmp_path/'labevents.parquet')
    again = scan(tmp_path/'labevents.parquet', TABLES['labevents'], 'labevents.parquet', protocol='official').collect()
    assert again.equals(official)


@pytest.mark.parametrize('bad', ['12x', '1.2.3', '1e', '--1', '1234567890123456789x'])
def test_what_is_no_number_still_stops_the_engine(tmp_path, bad):
    with pytest.raises(pl.exceptions.PolarsError):
        read_labs(tmp_path, 'official', text=LABS.replace('89.999997854232788', bad))


def test_demo_amounts_that_the_nearest_number_would_change(demo):
    "As many as pandas 1.5.3 reads otherwise."
    source, changed = open_source(demo), 0
    columns = dict.fromkeys(['inputevents', 'ingredientevents'], ['amount', 'rate'])
    for table, names in (columns | dict(procedureevents=['value'], labevents=['valuenum'])).items():
        of_both = [source.scan(table, names, protocol=protocol).select(names).collect(engine='streaming')
                   for protocol in ('official', 'strict')]
        changed += sum((of_both[0][name] != of_both[1][name]).sum() for name in names)
    assert changed == 15_142


def test_the_demo_shows_none_as_the_unit_of_procedures(demo):
    source = open_source(demo)
    for protocol, times in (('official', 771), ('strict', 0)):
        units = source.scan('procedureevents', ['valueuom'], protocol=protocol).collect()
        assert (units['valueuom'] == 'None').sum() == times


# whole numbers

TRIAGE = 'subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,pain,acuity,chiefcomplaint\n'
STAYS = 'subject_id,hadm_id,stay_id,intime,outtime,gender,race\n'
STAYS += '7,70,1,2180-05-06 10:00:00,2180-05-06 12:00:00,F,WHITE\n'


def two_tables(folder, triage):
    "A source of two tables."
    texts = dict(triage=TRIAGE + triage, edstays=STAYS)
    files = {table: folder/f'{table}.csv' for table in texts}
    for table, text in texts.items():
        files[table].write_text(text)
    return Source(folder, files, None)


@pytest.mark.parametrize('written, is_whole', [
    (('88', '91'), True),       # integers
    (('88', ''), False),        # a gap
    (('88', '91.5'), False),
    (('88.0', '91.0'), False),  # floats to pandas, whatever their values
    (('88', '91.0'), False),
])
def test_a_column_is_whole_where_pandas_reads_integers(tmp_path, written, is_whole):
    rows = ''.join(f'7,{stay},98.6,{rate},16,97,120,80,0,3,pain\n' for stay, rate in enumerate(written, 1))
    settings = SimpleNamespace(protocol='official', times='charttime')
    whole = stream_to_parts(two_tables(tmp_path, rows), 'triage', settings, 1, tmp_path)['integers']
    assert ('heartrate' in whole) == is_whole
    assert 'sbp' in whole
    assert 'temperature' not in whole


# rows without a time

def inserted_one_by_one(timed, timeless):
    "The rule, literally: rows in the order of the released program, without the patient's own."
    rows = list(timed)
    for new in timeless:
        pos = 0
        if new['table'] in ('diagnoses_icd', 'drgcodes') and new['hadm_id'] is not None:
            for place, old in enumerate(rows):
                counts = new['table'] == 'drgcodes' or old['table'] != 'drgcodes'
                if old['hadm_id'] == new['hadm_id'] and counts:
                    pos = place
        rows.insert(pos + 1, new)
        if pos == 0:
            rows.append(new)
    return rows


ADMISSIONS = st.sampled_from([None, 70, 71, 72])
TIMED = st.tuples(st.sampled_from(['labevents', 'poe', 'admissions', 'chartevents']), st.integers(1, 9), ADMISSIONS)
TIMELESS = st.tuples(
    st.sampled_from(['admissions', 'diagnoses_icd', 'drgcodes', 'hcpcsevents', 'microbiologyevents', 'triage']),
    st.none(), ADMISSIONS)
DATED = st.tuples(st.just('hcpcsevents'), st.integers(1, 9), ADMISSIONS)  # a time that the sort does not see
ROWS = st.lists(st.one_of(TIMED, TIMELESS, DATED), max_size=14)


def patient_rows(subject, drawn, with_patient):
    "Rows of a patient, each with a name of its own in `until`."
    rows = [row('patients', subject=subject)] if with_patient else []
    for n, (table, day, hadm) in enumerate(drawn, 1):
        rows.append(row(table, day and at(day), hadm, subject=subject, n=n, until=at(n)))
    return rows


def by_rule(rows):
    "Rows of one patient as the rule has them."
    patient, *others = rows if rows and rows[0]['table'] == 'patients' else [None, *rows]
    timed = [one for one in others if one['time'] and one['table'] != 'hcpcsevents']
    timeless = sorted((one for one in others if one not in timed), key=lambda one: one['order'])
    timed.sort(key=lambda one: (one['time'], one['order']))
    found = [patient] if patient else []
    found += inserted_one_by_one(timed, timeless)
    return [(one['subject_id'], one['table'], one['until']) for one in found]


@given(st.lists(st.tuples(ROWS, st.booleans()), min_size=1, max_size=3))
@example([([('diagnoses_icd', None, 70), ('diagnoses_icd', None, 70), ('drgcodes', None, 70)], True)])
@example([([('drgcodes', None, 70), ('diagnoses_icd', None, 70)], True)])
@example([([('hcpcsevents', None, 70), ('hcpcsevents', None, 70), ('labevents', 2, 70)], False)])
@example([([('admissions', None, 70), ('diagnoses_icd', None, 70), ('labevents', 2, 70)], True)])
def test_rows_without_a_time_stand_where_the_rule_says(patients):
    rows = [patient_rows(subject, *drawn) for subject, drawn in enumerate(patients, 1)]
    found = order_rows(merged([one for some in rows for one in some]), 'official')
    for subject, some in enumerate(rows, 1):
        own = found.filter(subject_id=subject).select('subject_id', 'table', 'until').rows()
        assert own == by_rule(some)


@given(ROWS)
def test_strict_has_every_row_once(drawn):
    rows = patient_rows(1, drawn, True)
    found = order_rows(merged(rows), 'strict')
    assert sorted(found['until'].drop_nulls()) == sorted(one['until'] for one in rows if one['until'])


def test_other_patients_do_not_move_a_row():
    drawn = [('diagnoses_icd', None, 70), ('labevents', 2, 70), ('hcpcsevents', None, 70), ('labevents', 3, 71)]
    alone, beside = patient_rows(1, drawn, True), patient_rows(2, drawn*2, True)
    both = order_rows(merged(beside + alone), 'official')
    assert both.filter(subject_id=1).equals(order_rows(merged(alone), 'official'))


def tables_of(rows, protocol):
    return store(rows, protocol)['table'].to_list()


STAY = [
    row('patients'),
    row('admissions', at(1), 70),
    row('labevents', at(2), 70),
    row('labevents', at(5), 71),
    row('diagnoses_icd', hadm=70),
    row('drgcodes', hadm=70),
]


def test_hcpcs_rows_stand_at_both_ends_and_split_runs():
    rows = [*STAY, row('hcpcsevents', hadm=70, n=1), row('hcpcsevents', hadm=70, n=2)]
    frame = store(rows, 'official')
    assert frame['table'].to_list() == [
        'patients', 'admissions', 'hcpcsevents', 'hcpcsevents', 'labevents', 'diagnoses_icd', 'drgcodes',
        'labevents', 'hcpcsevents', 'hcpcsevents']
    assert frame['event'].to_list() == [0, 1, 2, 2, 3, 4, 5, 6, 7, 7]


def test_diagnoses_of_an_unknown_admission_follow_the_first_that_was_appended():
    rows = [*STAY, *(row('diagnoses_icd', hadm=99, n=n, cells=[str(n)]) for n in (1, 2, 3))]
    frame = store(rows, 'official')
    codes = [cells.split(FIELD)[0] for cells in frame.filter(table='diagnoses_icd')['cells']]
    assert codes == ['1', '', '1', '2', '3']
    assert frame['table'].to_list()[-3:] == ['diagnoses_icd']*3
    assert tables_of(rows, 'strict').count('diagnoses_icd') == 4


def test_an_official_event_starts_with_its_first_row_that_has_a_time():
    rows = [
        row('patients'),
        row('admissions', at(1), 70),
        row('hcpcsevents', at(2), 70, n=1),
        row('hcpcsevents', at(3), 70, n=2),
        row('microbiologyevents', at(4), 70),
        row('microbiologyevents', None, 70, n=1),
    ]
    events = store(rows, 'official').select('event', 'table', 'start', 'end').unique(maintain_order=True).rows()
    assert events == [
        (0, 'patients', None, None),
        (1, 'admissions', at(1), at(1)),
        (2, 'microbiologyevents', None, None),
        (3, 'hcpcsevents', at(3), at(3)),  # the later one first
        (4, 'microbiologyevents', at(4), at(4)),
        (5, 'hcpcsevents', at(2), at(3)),
        (6, 'microbiologyevents', None, None),
    ]


def literal_windows(events):
    "Positions as the released program finds them: (table, position, begin) of triggers, (position, end) of admissions."
    begins, ends, day = set(), set(), timedelta(days=1)
    for j, (table, start, hadm) in enumerate(events):
        if start is None:
            continue
        near = [k for k, (_, other, own) in enumerate(events)
                if k and other is not None and own == hadm and (start - other < day if k < j else other - start < day)]
        if any(k < j for k in near):
            begins.add((table, j, min(near)))
        if table == 'admissions' and any(k > j for k in near):
            ends.add((j, max(near) + 1))
    return begins, ends


@given(ROWS)
@example([('labevents', 5, 70), ('poe', 5, 70), ('hcpcsevents', 5, 70), ('labevents', 2, 71)])
@example([('admissions', 2, 70), ('labevents', 5, 70), ('hcpcsevents', 2, 70)])
def test_windows_reach_where_the_released_program_lets_them(drawn):
    rows = patient_rows(1, drawn, True)
    for one in rows:
        one['cells'] = FIELD.join('x' for _ in one['cells'].split(FIELD))
    frame = store(rows, 'official')
    index = index_rows(frame, 'official')
    events = frame.unique('event', keep='first', maintain_order=True).select('table', 'start', 'hadm_id').rows()
    begins, ends = literal_windows(events)
    asked = ('labevents', 'poe', 'chartevents', 'microbiologyevents', 'admissions')
    found = index.filter(pl.col('task').is_in(asked)).select('task', 'trigger', 'begin').rows()
    assert set(found) == {window for window in begins if window[0] in asked}
    found = index.filter(task='Inpatient_Mortality').select('trigger', 'end').rows()
    assert set(found) == ends


def test_rows_that_are_placed_twice_are_counted(demo, tmp_path):
    run = Run('official', tmp_path)
    build_trajectories(open_source(demo), run, profile('demo', protocol='official', workers=1))
    counts = read_manifest(run.trajectories)['counts']
    assert counts['placed_twice'] == 244  # 61 HCPCS events, 183 cultures without a charttime
    assert counts['tables']['hcpcsevents']['rows'] == 2*61


@pytest.mark.parametrize('protocol, times', [
    ('official', [at(1, 9), None]),
    ('strict', [at(1, 9), at(2)]),
])
def test_the_released_sort_does_not_try_the_date_of_a_culture(protocol, times):
    cultures = pl.LazyFrame(dict(
        subject_id=[1, 1], row=[0, 1], charttime=[at(1, 9), None], chartdate=[at(1), at(2)], storetime=[None, None]))
    found = merged_rows(cultures, 'microbiologyevents', protocol, 'charttime').collect()
    assert found['time'].to_list() == times


# what the prompt asks

SAID = {task: f'Please say what of {task} is next.' for task in TASKS}
CODE = """
import nothing_that_is_there
class Data:
    def __init__(self):
        self.task_info = INFO
        raise SystemExit('this was run')
""".replace('INFO', repr({task: dict(metric='em', instruction=said) for task, said in SAID.items()}))


def official_line(task, said):
    "A record of an official file."
    return json.dumps(dict(instruction=said, input='## Patient', output='x', task_info=dict(task=task)))


@pytest.fixture
def named(tmp_path, monkeypatch):
    "Names a file or folder in `EHR_R1_OFFICIAL`."
    def write(name, text):
        path = tmp_path/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('.gz'):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        monkeypatch.setenv('EHR_R1_OFFICIAL', str(path if '/' not in name else tmp_path))
        return path
    return write


def test_instructions_are_ours_where_nothing_is_named(monkeypatch):
    monkeypatch.delenv('EHR_R1_OFFICIAL', raising=False)
    assert released_instructions() == {}


@pytest.mark.parametrize('name', ['mimiciv_dataset/mimiciv.py', 'mimiciv.py', 'bench.jsonl', 'bench.jsonl.gz'])
def test_released_instructions_are_read_from_the_users_copy(named, name):
    lines = '\n'.join(official_line(*one) for one in SAID.items())
    named(name, CODE if name.endswith('.py') else lines + '\nno record, behind all tasks\n')
    assert released_instructions() == SAID


@pytest.mark.parametrize('name, text, words', [
    ('bench.jsonl', 'no record', 'bench.jsonl, row 1'),
    ('bench.jsonl', '[1]', 'bench.jsonl, row 1'),
    ('bench.jsonl', official_line('omr', 'a') + '\n' + official_line('omr', 'b'), 'omr has two instructions'),
    ('bench.jsonl', official_line('omr', 'a\nb'), 'omr is not one line'),
    ('bench.jsonl', official_line('omr', ''), 'omr is not one line'),
    ('bench.jsonl', official_line('sleep', 'a'), 'no instruction of a task'),
    ('bench.jsonl.gz', '', 'no instruction of a task'),
    ('mimiciv.py', 'class (', 'cannot be read'),
    ('else/README.md', 'nothing', 'cannot be read'),
])
def test_a_copy_without_instructions_is_refused(named, name, text, words):
    named(name, text)
    with pytest.raises(TableError, match=words):
        released_instructions()


def test_prompts_ask_in_the_released_wording():
    events = store([*STAY, row('services', at(2, 2), 70, ['MED'])], 'official')
    sample = next(one for one in index_rows(events, 'official').rows(named=True) if one['task'] == 'services')
    text, *_ = Record(events, 'official', asked=SAID).prompt(sample, 0)
    assert text.endswith('\n' + SAID['services'])
    assert TASKS['services'].instruction not in text


def words(text):
    return len(text.split())


QUESTIONS = st.one_of(st.sampled_from([task.instruction for task in TASKS.values()]), st.just('What comes next?'))


@given(st.sampled_from(list(TASKS)), QUESTIONS, st.integers(20, 400))
def test_a_record_that_holds_its_question_is_not_given_a_second_one(task, question, limit):
    labs = [f'## Labs [2150-01-0{day} 08:00]\n- Sodium 140' for day in range(1, 9)]
    record = '\n\n'.join(['## Patient\n- gender F', *labs])
    assert split_question(f'{record}\n{question}', task) == (record, question)
    short, _, _ = shorten(f'{record}\n{question}', task, limit, words)
    assert short.endswith('\n' + question)
    assert short.count('?') + short.count('Answer') == question.count('?') + question.count('Answer')
    assert shorten(short, task, limit, words)[0] == short
