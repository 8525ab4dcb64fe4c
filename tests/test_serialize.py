"Golden texts: the official style byte for byte, and what a prompt is made of."
import polars as pl, pytest
from hypothesis import given, strategies as st
from ehr_r1.data.samples import Record
from ehr_r1.data.serialize import compact_event, estimate_tokens, official_event, prompt, short_number
from ehr_r1.data.tasks import TASKS, index_rows
from ehr_r1.data.trajectories import DISPLAY, ITEM
from records import at, row, store

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

ROWS = [row('patients', cells=['60.0', 'F']), row('admissions', at(1), 6, ['URGENT', 'CLINIC'], until=at(2)), row('discharge', at(2), 6, ['DS', 'Earlier stay.']),
        row('admissions', at(9, 8), 7, ['EW EMER.', 'EMERGENCY ROOM'], until=at(12)),
        row('labevents', at(9, 9), 7, ['Sodium', '138.0', 'mEq/L', '133.0', '145.0']), row('labevents', at(9, 9), 7, ['Lactate', '4.1', 'mmol/L', '0.5', '2.0', 'abnormal'], n=1),
        row('icustays', at(9, 10), 7, until=at(11), stay=9), row('radiology', at(9, 11), 7, ['RR', f'CHEST{ITEM}CT HEAD', 'Clear.']), row('hcpcsevents', at(9, 12), 7),
        row('prescriptions', at(9, 13), 7, ['Aspirin', '', '81mg Tab', '81', 'mg']), row('services', at(9, 14), 7, ['MED'])]

def test_official_prompt_byte_for_byte():
    events = store(ROWS, 'official')
    s = index_rows(events, 'official').filter(pl.col('task') == 'services').row(0, named=True)
    assert Record(events, 'official').prompt(s, 0)[0] == GOLDEN + TASKS['services'].instruction

def test_a_missing_head_part_stays_in_the_join():
    events = store([r for r in ROWS if r['hadm_id'] != 6], 'official')
    s = index_rows(events, 'official').filter(pl.col('task') == 'services').row(0, named=True)
    assert Record(events, 'official').prompt(s, 0)[0].startswith('## Patient Demographics [None]\n- Anchor_Age: 60.0\n- Gender: F\n\n\n\n## Admissions [')

def test_admission_tasks_do_not_show_the_admission():
    rows = [ROWS[0], row('labevents', at(9, 7), 7, ['Sodium']), *ROWS[3:]]
    events = store(rows, 'official')
    s = index_rows(events, 'official').filter(pl.col('task') == 'admissions').row(0, named=True)
    assert 'Admissions' not in Record(events, 'official').prompt(s, 0)[0]

def test_integer_columns_lose_their_point_only_where_the_data_set_says_so():
    cells = '\x1f'.join(['Foley', '600.0', 'ml'])
    assert '- Value: 600.0' in official_event('outputevents', at(1), [cells]) and '- Value: 600\n' in official_event('outputevents', at(1), [cells], ('value',))

@pytest.mark.parametrize('table', [t for t in DISPLAY if t not in ('hcpcsevents', 'drgcodes')])
def test_every_table_has_both_styles(table):
    d = DISPLAY[table]
    full = row(table, at(1), cells=[f'v{i}' for i in range(len(d.columns))])['cells']; empty = row(table, at(1))['cells']
    one, two = official_event(table, at(1), [full]), official_event(table, at(1), [full, empty])
    assert one.count('\n- ') == len(d.columns) and len(two.split('\n')) == 5 and all(f'v{i}' in one for i in range(len(d.columns)))
    assert len(compact_event(table, at(1), [empty]).split('\n')) == 1 and 'nan' not in compact_event(table, at(1), [full, empty])

@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_short_numbers_stay_close(x):
    short = float(short_number(str(x)))
    assert abs(short - x) <= max(5e-4*abs(x), 0.5 if abs(x) >= 1000 else 0)

def test_the_budget_drops_the_oldest_and_keeps_head_and_question():
    events = [f'## Labs\n- item {i}' for i in range(50)]
    text, tokens, dropped = prompt(['HEAD', '', 'ADMISSION'], events, 'QUESTION', 'compact', budget=100)
    assert 0 < dropped < 50 and tokens <= 100 and text.startswith('HEAD') and text.endswith('QUESTION') and f'item {dropped}' in text and f'item {dropped - 1}\n' not in text
    assert prompt(['HEAD '*500], events, 'QUESTION', 'compact', budget=10)[2] == 50 # never the head
    assert prompt(['HEAD'], events, 'QUESTION', 'official', budget=0)[2] == 0

@given(st.text(max_size=200))
def test_token_estimate_never_raises(text): assert 0 <= estimate_tokens(text) <= max(1, len(text))
