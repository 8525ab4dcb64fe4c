"Labels and windows by hand, for every task and both protocols."
import polars as pl, pytest
from ehr_r1.data.tasks import GROUPS, TASKS, Events, index_rows
from ehr_r1.data.events import DISPLAY, ITEM
from records import at, row, store

def labels(rows, protocol, task):
    return index_rows(store(rows, protocol), protocol).filter(pl.col('task') == task)['label'].to_list()

def one(rows, protocol, task):
    found = labels(rows, protocol, task)
    assert len(found) == 1, (task, found)
    return found[0][0]

PATIENT = row('patients', cells=['60.0', 'F'])
BEFORE = [row('labevents', at(1, h), 7, {'item_name': 'Before'}) if h % 2 else row('poe', at(1, h), 7, {'order_type': 'Before'}) for h in range(1, 4)]

@pytest.mark.parametrize('protocol', ['official', 'strict'])
@pytest.mark.parametrize('task', [t for t in TASKS.values() if t.family == 'decision' and t.name != 'next_event'], ids=lambda t: t.name)
def test_decision_labels(task, protocol):
    hadm = None if DISPLAY[task.trigger].module == 'ed' else 7
    before = [dict(r, hadm_id=hadm) for r in BEFORE]
    time = None if task.trigger == 'diagnoses_icd' else at(1, 6)
    column = task.target
    values = ['B', 'A', 'B', '', ' A ', 'nan', 'None'] # distinct, stripped, not empty, in the order of the record
    trigger = [row(task.trigger, time, hadm, {column: v, **({'eventtype': 'admit'} if task.name == 'transfers' else {})}, n=i) for i, v in enumerate(values)]
    between = row('hcpcsevents', at(1, 5), hadm) # ends the event before, whatever its table
    got = [l for l in labels([PATIENT, *before, between, *trigger], protocol, task.name) if l != ['Before']]
    want = ['B', 'A', 'admit'] if task.name == 'transfers' else ['B', 'A']
    if protocol == 'strict': got, want = [sorted(l) for l in got], sorted(want) # strict breaks ties by content
    elif task.target in GROUPS: want = sorted(want)
    assert got == [want]

def test_transfers_fall_back_to_eventtype():
    rows = [PATIENT, *BEFORE, row('transfers', at(1, 6), 7, {'eventtype': 'discharge', 'careunit': ''})]
    assert labels(rows, 'strict', 'transfers') == [['discharge']]

def test_radiology_takes_all_examinations_of_the_note():
    rows = [PATIENT, *BEFORE, row('radiology', at(1, 6), 7, {'exam_name': f'CHEST{ITEM}CT HEAD'})]
    assert labels(rows, 'official', 'radiology') == [['CHEST', 'CT HEAD']]

def test_next_event_asks_for_every_shown_table_but_patients():
    rows = [PATIENT, *BEFORE, row('hcpcsevents', at(1, 5), 7), row('services', at(1, 6), 7, ['MED']), row('diagnoses_icd', None, 7, ['Sepsis']), row('drgcodes', None, 7)]
    assert labels(rows, 'official', 'next_event') == [['poe'], ['labevents'], ['services'], ['diagnoses_icd']]

def test_windows_reach_back_less_than_24_hours_in_the_same_admission():
    rows = [PATIENT, row('labevents', at(1, 6), 7), row('poe', at(1, 7), 7), row('labevents', at(1, 8), 8), row('poe', at(1, 9), 7), row('services', at(2, 6), 7, ['MED'])]
    s = index_rows(store(rows, 'official'), 'official').filter(pl.col('task') == 'services').row(0, named=True)
    assert (s['begin'], s['end']) == (2, 5) # 06:00 the day before is 24 h ago, not less
    assert labels(rows[:2] + rows[-1:], 'official', 'services') == [] # no window, no sample

def ed(hours_to_icu=None, died=None, admitted=True, back=None, dod=None, out=at(1, 16)):
    rows = [row('patients', cells=['60.0', 'F'], died=dod), row('edstays', at(1, 8), 7 if admitted else None, ['F', 'WHITE'], until=out, stay=5), row('vitalsign', at(1, 9), None, ['98.6'], stay=5)]
    if admitted: rows += [row('admissions', at(1, 17), 7, ['EW EMER.'], until=at(6, 8), died=died), row('labevents', at(6, 7), 7, ['Sodium'])]
    if hours_to_icu is not None: rows.append(row('icustays', at(1, 16 + hours_to_icu), 7, until=at(4), stay=9))
    if back is not None: rows.append(row('edstays', back, None, ['F', 'WHITE'], until=None, stay=6))
    return rows

@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_emergency_department(protocol):
    assert one(ed(), protocol, 'ED_Hospitalization') == 'yes' and one(ed(admitted=False), protocol, 'ED_Hospitalization') == 'no'
    assert one(ed(2), protocol, 'ED_ICU_Tranfer_12hour') == 'yes' and one(ed(12), protocol, 'ED_ICU_Tranfer_12hour') == 'no' and one(ed(), protocol, 'ED_ICU_Tranfer_12hour') == 'no'
    first = lambda rows, task: labels(rows, protocol, task)[0][0]
    assert first(ed(back=at(4, 15)), 'ED_Reattendance_3day') == 'yes' and first(ed(back=at(4, 16)), 'ED_Reattendance_3day') == 'no'
    assert one(ed(dod=at(6), died=at(6, 7, 30)), protocol, 'ED_Inpatient_Mortality') == 'yes' and one(ed(dod=at(9)), protocol, 'ED_Inpatient_Mortality') == 'no'
    assert one(ed(2), protocol, 'ED_Critical_Outcomes') == 'yes' and one(ed(dod=at(6), died=at(6, 7, 30)), protocol, 'ED_Critical_Outcomes') == 'yes' and one(ed(20), protocol, 'ED_Critical_Outcomes') == 'no'

def test_an_icu_stay_before_ed_outtime_counts_officially_and_is_not_asked_strictly():
    assert one(ed(-1), 'official', 'ED_ICU_Tranfer_12hour') == 'yes' and labels(ed(-1), 'strict', 'ED_ICU_Tranfer_12hour') == [] and labels(ed(-1), 'strict', 'ED_Critical_Outcomes') == []

def test_a_death_on_the_day_of_discharge_is_midnight_officially():
    "dod is a date at 00:00: the last event of the day before decides."
    rows = ed(dod=at(6))
    assert one(rows, 'official', 'ED_Inpatient_Mortality') == 'yes' # last event at 07:00 is not before 00:00
    assert one(rows, 'strict', 'ED_Inpatient_Mortality') == 'no'    # discharged at 08:00, dead by the end of the day, no deathtime

def admission(hours, dod=None, died=None):
    from datetime import timedelta
    return [row('patients', cells=['60.0', 'F'], died=dod), row('admissions', at(1), 7, ['URGENT'], until=at(1) + timedelta(hours=hours), died=died), *BEFORE]

@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_admissions(protocol):
    for days in (3, 7):
        assert one(admission(days*24), protocol, f'LengthOfStay_{days}day') == 'no' and one(admission(days*24 + 1), protocol, f'LengthOfStay_{days}day') == 'yes'
    assert one(admission(60, at(3), at(3, 11)), protocol, 'Inpatient_Mortality') == 'yes' and one(admission(60, at(4)), protocol, 'Inpatient_Mortality') == 'no' and one(admission(60), protocol, 'Inpatient_Mortality') == 'no'

def test_a_stay_that_ends_inside_the_window():
    assert one(admission(20), 'official', 'Inpatient_Mortality') == 'no' and labels(admission(20), 'strict', 'Inpatient_Mortality') == []
    assert one(admission(20), 'official', 'LengthOfStay_3day') == 'no' and labels(admission(20), 'strict', 'LengthOfStay_3day') == []

def icu(hours, dod=None, died=None, again=None):
    from datetime import timedelta
    rows = [row('patients', cells=['60.0', 'F'], died=dod), row('admissions', at(1), 7, ['URGENT'], until=at(40), died=died), row('icustays', at(1), 7, until=at(1) + timedelta(hours=hours), stay=9), row('chartevents', at(1, 23), 7, ['HR', '90.0'], stay=9)]
    return rows + ([row('icustays', again, 7, until=at(39), stay=10)] if again else [])

@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_intensive_care(protocol):
    for days in (7, 14): assert one(icu(days*24), protocol, f'ICU_Stay_{days}day') == 'yes' and one(icu(days*24 - 1), protocol, f'ICU_Stay_{days}day') == 'no'
    first = lambda rows, task: labels(rows, protocol, task)[0][0]
    assert first(icu(48, again=at(5)), 'ICU_Readmission') == 'yes' and one(icu(48), protocol, 'ICU_Readmission') == 'no'
    for days in (1, 2, 3, 7, 14):
        dies, lives = at(1 + days, 12), at(3 + days, 12)
        assert one(icu(2000, at(1 + days), dies), protocol, f'ICU_Mortality_{days}day') == 'yes', days
        assert one(icu(2000, at(3 + days), lives), protocol, f'ICU_Mortality_{days}day') == 'no', days
        assert one(icu(2000), protocol, f'ICU_Mortality_{days}day') == 'no'

def test_icu_stays_that_ended_are_not_asked_strictly():
    assert labels(icu(20), 'strict', 'ICU_Stay_7day') == [] and one(icu(20), 'official', 'ICU_Stay_7day') == 'no'

def readmission(then, kind='EW EMER.', died=None):
    return [row('patients', cells=['60.0', 'F'], died=died), row('admissions', at(1), 7, ['URGENT'], until=at(3, 12), died=died), row('labevents', at(3, 6), 7, ['Sodium']), row('discharge', at(3, 13), 7, ['DS', 'text']),
            *([row('admissions', then, 8, [kind], until=None)] if then else [])]

@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_readmission(protocol):
    for days in (30, 60):
        assert one(readmission(at(2 + days)), protocol, f'Readmission_{days}day') == 'yes' and one(readmission(at(4 + days)), protocol, f'Readmission_{days}day') == 'no' and one(readmission(None), protocol, f'Readmission_{days}day') == 'no'

def test_planned_readmissions_and_deaths():
    assert one(readmission(at(9), 'ELECTIVE'), 'official', 'Readmission_30day') == 'yes' and one(readmission(at(9), 'ELECTIVE'), 'strict', 'Readmission_30day') == 'no'
    assert one(readmission(None, died=at(3, 12)), 'official', 'Readmission_30day') == 'no' and labels(readmission(None, died=at(3, 12)), 'strict', 'Readmission_30day') == []

def test_the_index_names_the_admission_and_the_last_earlier_discharge_note():
    rows = readmission(at(9)) + [row('labevents', at(9, 1), 8, ['Sodium']), row('services', at(9, 2), 8, ['MED'])]
    s = index_rows(store(rows, 'official'), 'official').filter(pl.col('task') == 'services').row(0, named=True)
    events = store(rows, 'official').unique('event', keep='first').sort('event')['table'].to_list()
    assert events[s['admissions_event']] == 'admissions' and events[s['discharge_event']] == 'discharge' and s['admissions_event'] > s['discharge_event']
    own = index_rows(store(rows, 'official'), 'official').filter(pl.col('task') == 'Readmission_30day').row(0, named=True)
    assert own['discharge_event'] is None # the trigger is not an earlier note

def test_every_task_is_covered_here_and_unknown_patients_do_no_harm():
    assert len(TASKS) == 45 and index_rows(store([PATIENT], 'strict'), 'strict').height == 0
    assert Events(store([PATIENT], 'strict')).n == 1

def test_a_label_ends_with_its_cell_whatever_its_letters():
    rows = [PATIENT, row('admissions', at(1), 7), row('labevents', at(1, 1), 7, ['Sodium']), row('emar', at(1, 2), 7, ['Morphine Infusion – Comfort Care', 'Administered'])]
    assert labels(rows, 'strict', 'emar') == [['Morphine Infusion – Comfort Care']]
