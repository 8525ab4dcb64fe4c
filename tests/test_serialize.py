"Golden texts: the official style byte for byte, and what a prompt is made of."
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import at, row, store

from ehr_r1.data.events import DISPLAY, HIDDEN, ITEM
from ehr_r1.data.index import index_rows
from ehr_r1.data.samples import Record
from ehr_r1.data.serialize import compact_event, estimate_tokens, fitted_prompt, official_event, short_number
from ehr_r1.data.tasks import TASKS

GOLDEN = """\
## Patient Demographics [None]
- Anchor_Age: 60.0
- Gender: F

## Discharge [2150-01-02 00:00:00]
- Note_Type: DS
- Text: Earlier stay.

## Admissions [2150-01-09 08:00:00]
- Admission_Type: EW EMER.
- Admission_Location: EMERGENCY ROOM
- Admission_Info: None

## Labotary Test Events [2150-01-09 09:00:00]
| Item_Name | Valuenum | Valueuom | Ref_Range_Lower | Ref_Range_Upper | Flag | Comments |
| ------ | ------ | ------ | ------ | ------ | ------ | ------ |
| Sodium | 138.0 | mEq/L | 133.0 | 145.0 | nan | nan |
| Lactate | 4.1 | mmol/L | 0.5 | 2.0 | abnormal | nan |

## ICUstays [2150-01-09 10:00:00]


## Radiology Examinations [2150-01-09 11:00:00]
- Note_Type: RR
- Exam_Name: ['CHEST', 'CT HEAD']
- Text: Clear.

## Prescriptions [2150-01-09 13:00:00]
- Drug: Aspirin
- Atc Type: None
- Prod_Strength: 81mg Tab
- Dose_Val_Rx: 81
- Dose_Unit_Rx: mg
"""

PATIENT = row('patients', cells=['60.0', 'F'])
EARLIER = [
    row('admissions', at(1), 6, ['URGENT', 'CLINIC'], until=at(2)),
    row('discharge', at(2), 6, ['DS', 'Earlier stay.']),
]
SODIUM = ['Sodium', '138.0', 'mEq/L', '133.0', '145.0']
LACTATE = ['Lactate', '4.1', 'mmol/L', '0.5', '2.0', 'abnormal']
STAY = [
    row('admissions', at(9, 8), 7, ['EW EMER.', 'EMERGENCY ROOM'], until=at(12)),
    row('labevents', at(9, 9), 7, SODIUM),
    row('labevents', at(9, 9), 7, LACTATE, n=1),
    row('icustays', at(9, 10), 7, until=at(11), stay=9),
    row('radiology', at(9, 11), 7, ['RR', f'CHEST{ITEM}CT HEAD', 'Clear.']),
    row('prescriptions', at(9, 13), 7, ['Aspirin', '', '81mg Tab', '81', 'mg']),
    row('services', at(9, 14), 7, ['MED']),
]
SHOWN_TABLES = [table for table in DISPLAY if table not in HIDDEN]


def official_prompt(rows, task):
    "The prompt of the first sample of a task."
    events = store(rows, 'official')
    index = index_rows(events, 'official')
    samples = index.rows(named=True)
    sample = next(sample for sample in samples if sample['task'] == task)
    text, *_ = Record(events, 'official').prompt(sample, 0)
    return text


def test_official_prompt_byte_for_byte():
    text = official_prompt([PATIENT, *EARLIER, *STAY], 'services')
    assert text == GOLDEN + TASKS['services'].instruction


def test_a_missing_head_part_stays_in_the_join():
    text = official_prompt([PATIENT, *STAY], 'services')
    assert text.startswith('## Patient Demographics [None]\n- Anchor_Age: 60.0\n- Gender: F\n\n\n\n## Admissions [')


def test_an_event_that_is_never_shown_stays_in_the_join():
    text = official_prompt([PATIENT, *STAY, row('hcpcsevents', at(9, 12), 7)], 'services')  # placed behind the first
    assert '- Admission_Info: None\n\n\n\n## Labotary Test Events [' in text


def test_admission_tasks_do_not_show_the_admission():
    before = row('labevents', at(9, 7), 7, ['Sodium'])
    text = official_prompt([PATIENT, before, *STAY], 'admissions')
    assert 'Admissions' not in text


@pytest.mark.parametrize('integers, line', [([], '- Value: 600.0\n'), (['value'], '- Value: 600\n')])
def test_integer_columns_lose_their_point_only_where_the_data_set_says_so(integers, line):
    output = row('outputevents', cells=['Foley', '600.0', 'ml'])['cells']
    assert line in official_event('outputevents', at(1), [output], integers)


@pytest.fixture(params=SHOWN_TABLES)
def event(request):
    "A table, a row of it with all its cells, and one with none."
    table = request.param
    cells = [f'v{i}' for i, _ in enumerate(DISPLAY[table].columns)]
    return table, row(table, cells=cells)['cells'], row(table)['cells']


def test_one_official_row_is_a_list_of_all_columns(event):
    table, full, _ = event
    text = official_event(table, at(1), [full])
    columns = len(DISPLAY[table].columns)
    assert text.count('\n- ') == columns
    assert all(f'v{i}' in text for i in range(columns))


def test_two_official_rows_are_a_table(event):
    table, full, empty = event
    lines = official_event(table, at(1), [full, empty]).split('\n')
    assert len(lines) == 5


def test_compact_events_leave_out_what_is_missing(event):
    table, full, empty = event
    assert '\n' not in compact_event(table, at(1), [empty])
    assert 'nan' not in compact_event(table, at(1), [full, empty])


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_short_numbers_stay_close(number):
    short = float(short_number(str(number)))
    rounding = 0.5 if abs(number) >= 1000 else 0
    assert abs(short - number) <= max(5e-4*abs(number), rounding)


EVENTS = [f'## Labs\n- item {i}' for i in range(50)]


def test_the_budget_drops_the_oldest_and_keeps_head_and_question():
    head = ['HEAD', '', 'ADMISSION']
    text, tokens, dropped = fitted_prompt(head, EVENTS, 'QUESTION', 'compact', budget=100)
    assert 0 < dropped < 50
    assert tokens <= 100
    assert text.startswith('HEAD') and text.endswith('QUESTION')
    assert f'item {dropped}' in text
    assert f'item {dropped - 1}\n' not in text


def test_the_head_is_never_dropped():
    _, _, dropped = fitted_prompt(['HEAD '*500], EVENTS, 'QUESTION', 'compact', budget=10)
    assert dropped == len(EVENTS)


def test_nothing_is_dropped_without_a_budget():
    _, _, dropped = fitted_prompt(['HEAD'], EVENTS, 'QUESTION', 'official', budget=0)
    assert dropped == 0


@given(st.text(max_size=200))
def test_token_estimate_never_raises(text):
    tokens = estimate_tokens(text)
    assert 0 <= tokens <= max(1, len(text))
