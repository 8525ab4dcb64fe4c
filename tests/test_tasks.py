"Labels and windows by hand, for every task and both protocols."
from datetime import timedelta

import polars as pl
import pytest
from records import at, row, store

from ehr_r1.data.events import DISPLAY, ITEM
from ehr_r1.data.index import index_rows
from ehr_r1.data.task_events import Events
from ehr_r1.data.tasks import GROUP_TARGETS, TASKS

BOTH = pytest.mark.parametrize('protocol', ['official', 'strict'])
PERSON = ['60.0', 'F']
PATIENT = row('patients', cells=PERSON)
BEFORE = [
    row('labevents', at(1, 1), 7, {'item_name': 'Before'}),
    row('poe', at(1, 2), 7, {'order_type': 'Before'}),
    row('labevents', at(1, 3), 7, {'item_name': 'Before'}),
]


def indexed(rows, protocol):
    return index_rows(store(rows, protocol), protocol)


def samples(rows, protocol, task):
    "The index rows of one task."
    return indexed(rows, protocol).filter(pl.col('task') == task)


def labels(rows, protocol, task):
    return samples(rows, protocol, task)['label'].to_list()


def first(rows, protocol, task):
    "The answer of the first sample."
    return labels(rows, protocol, task)[0][0]


def only(rows, protocol, task):
    "The answer of the only sample."
    found = labels(rows, protocol, task)
    assert len(found) == 1, (task, found)
    return found[0][0]


# decisions

DECISIONS = [task for task in TASKS.values() if task.family == 'decision' and task.trigger != 'any']


@BOTH
@pytest.mark.parametrize('task', DECISIONS, ids=lambda task: task.name)
def test_answers_are_distinct_and_stripped_and_never_empty(task, protocol):
    hadm = None if DISPLAY[task.trigger].module == 'ed' else 7
    time = None if task.trigger == 'diagnoses_icd' else at(1, 6)
    kind = {'eventtype': 'admit'} if task.name == 'transfers' else {}
    values = ['B', 'A', 'B', '', ' A ', 'nan', 'None']
    trigger = []
    for n, value in enumerate(values):
        cells = kind | {task.target: value}
        trigger.append(row(task.trigger, time, hadm, cells, n=n))
    ends_the_event_before = row('pharmacy', at(1, 5), hadm)
    before = [dict(r, hadm_id=hadm) for r in BEFORE]

    rows = [PATIENT, *before, ends_the_event_before, *trigger]
    found = labels(rows, protocol, task.name)
    answer, = [label for label in found if label != ['Before']]

    expected = ['B', 'A', 'admit'] if task.name == 'transfers' else ['B', 'A']  # in the order of the record
    if protocol == 'strict':  # which strict replaces by that of the content
        assert sorted(answer) == sorted(expected)
    elif task.target in GROUP_TARGETS:
        assert answer == sorted(expected)
    else:
        assert answer == expected


def test_a_transfer_without_a_care_unit_is_answered_by_its_kind():
    moved = row('transfers', at(1, 6), 7, {'eventtype': 'discharge', 'careunit': ''})
    assert labels([PATIENT, *BEFORE, moved], 'strict', 'transfers') == [['discharge']]


def test_radiology_takes_all_examinations_of_the_note():
    note = row('radiology', at(1, 6), 7, {'exam_name': f'CHEST{ITEM}CT HEAD'})
    assert labels([PATIENT, *BEFORE, note], 'official', 'radiology') == [['CHEST', 'CT HEAD']]


def test_next_event_asks_for_every_shown_table_but_patients():
    rows = [
        PATIENT, *BEFORE,
        row('hcpcsevents', at(1, 5), 7),
        row('services', at(1, 6), 7, ['MED']),
        row('diagnoses_icd', None, 7, ['Sepsis']),
        row('drgcodes', None, 7),
    ]
    answers = [label for label, in labels(rows, 'official', 'next_event')]
    assert answers == ['poe', 'labevents', 'services', 'diagnoses_icd']


def test_a_label_ends_with_its_cell_whatever_its_letters():
    drug = 'Morphine Infusion – Comfort Care'
    rows = [
        PATIENT,
        row('admissions', at(1), 7),
        row('labevents', at(1, 1), 7, ['Sodium']),
        row('emar', at(1, 2), 7, [drug, 'Administered']),
    ]
    assert labels(rows, 'strict', 'emar') == [[drug]]


def test_a_window_reaches_back_less_than_24_hours():
    rows = [
        PATIENT,
        row('labevents', at(1, 6), 7),  # 24 h before the trigger, not less
        row('poe', at(1, 7), 7),
        row('labevents', at(1, 8), 8),
        row('poe', at(1, 9), 7),
        row('services', at(2, 6), 7, ['MED']),
    ]
    sample = samples(rows, 'official', 'services').row(0, named=True)
    assert (sample['begin'], sample['end']) == (2, 5)


def test_without_a_window_there_is_no_sample():
    rows = [
        PATIENT,
        row('labevents', at(1, 6), 7),
        row('services', at(2, 6), 7, ['MED']),
    ]
    assert labels(rows, 'official', 'services') == []


# risks of ED stays

def ed(
    hours_to_icu=None,  # from outtime to the ICU
    died=None,          # deathtime
    admitted=True,
    back=None,          # intime of another stay
    dod=None            # date of death
):
    "A stay in the emergency department from 8:00 to 16:00, and what follows."
    hadm = 7 if admitted else None
    rows = [
        row('patients', cells=PERSON, died=dod),
        row('edstays', at(1, 8), hadm, until=at(1, 16), stay=5),
        row('vitalsign', at(1, 9), None, ['98.6'], stay=5),
    ]
    if admitted:
        rows += [
            row('admissions', at(1, 17), 7, ['EW EMER.'], until=at(6, 8), died=died),
            row('labevents', at(6, 7), 7, ['Sodium']),
        ]
    if hours_to_icu is not None:
        intime = at(1, 16 + hours_to_icu)
        rows.append(row('icustays', intime, 7, until=at(4), stay=9))
    if back is not None:
        rows.append(row('edstays', back, None, stay=6))
    return rows


DIES_IN_HOSPITAL = dict(dod=at(6), died=at(6, 7, 30))


@BOTH
@pytest.mark.parametrize('stay, task, answer', [
    (dict(), 'ED_Hospitalization', 'yes'),
    (dict(admitted=False), 'ED_Hospitalization', 'no'),
    (dict(hours_to_icu=2), 'ED_ICU_Tranfer_12hour', 'yes'),
    (dict(hours_to_icu=12), 'ED_ICU_Tranfer_12hour', 'no'),
    (dict(), 'ED_ICU_Tranfer_12hour', 'no'),
    (DIES_IN_HOSPITAL, 'ED_Inpatient_Mortality', 'yes'),
    (dict(dod=at(9)), 'ED_Inpatient_Mortality', 'no'),
    (dict(hours_to_icu=2), 'ED_Critical_Outcomes', 'yes'),
    (DIES_IN_HOSPITAL, 'ED_Critical_Outcomes', 'yes'),
    (dict(hours_to_icu=20), 'ED_Critical_Outcomes', 'no'),
])
def test_risks_of_an_ed_stay(protocol, stay, task, answer):
    assert only(ed(**stay), protocol, task) == answer


@BOTH
@pytest.mark.parametrize('hour, answer', [
    (15, 'yes'),
    (16, 'no'),
])
def test_reattendance_is_less_than_72_hours_after_outtime(protocol, hour, answer):
    assert first(ed(back=at(4, hour)), protocol, 'ED_Reattendance_3day') == answer


def test_officially_an_icu_stay_before_outtime_counts():
    assert only(ed(hours_to_icu=-1), 'official', 'ED_ICU_Tranfer_12hour') == 'yes'


@pytest.mark.parametrize('task', ['ED_ICU_Tranfer_12hour', 'ED_Critical_Outcomes'])
def test_strictly_who_is_in_an_icu_at_outtime_is_not_asked(task):
    assert labels(ed(hours_to_icu=-1), 'strict', task) == []


@pytest.mark.parametrize('protocol, answer', [
    ('official', 'yes'),  # dod is a date at 00:00: the last event, at 07:00, is not before it
    ('strict', 'no'),     # discharged at 08:00, dead by the end of the day, no deathtime
])
def test_a_death_on_the_day_of_discharge(protocol, answer):
    assert only(ed(dod=at(6)), protocol, 'ED_Inpatient_Mortality') == answer


# risks of admissions

def admission(hours, dod=None, died=None):
    "An admission of some hours."
    dischtime = at(1) + timedelta(hours=hours)
    return [
        row('patients', cells=PERSON, died=dod),
        row('admissions', at(1), 7, ['URGENT'], until=dischtime, died=died),
        *BEFORE,
    ]


@BOTH
@pytest.mark.parametrize('days', [3, 7])
@pytest.mark.parametrize('hours_more, answer', [
    (0, 'no'),
    (1, 'yes'),
])
def test_a_length_of_stay_is_longer_than_its_days(protocol, days, hours_more, answer):
    assert only(admission(days*24 + hours_more), protocol, f'LengthOfStay_{days}day') == answer


@BOTH
@pytest.mark.parametrize('deaths, answer', [
    (dict(dod=at(3), died=at(3, 11)), 'yes'),
    (dict(dod=at(4)), 'no'),
    (dict(), 'no'),
])
def test_inpatient_mortality(protocol, deaths, answer):
    assert only(admission(60, **deaths), protocol, 'Inpatient_Mortality') == answer


@pytest.mark.parametrize('task', ['Inpatient_Mortality', 'LengthOfStay_3day'])
def test_a_stay_that_ends_inside_the_window_is_asked_officially_only(task):
    assert only(admission(20), 'official', task) == 'no'
    assert labels(admission(20), 'strict', task) == []


# risks of ICU stays

def icu(hours, dod=None, died=None, again=None):
    "A stay in intensive care of some hours."
    outtime = at(1) + timedelta(hours=hours)
    rows = [
        row('patients', cells=PERSON, died=dod),
        row('admissions', at(1), 7, ['URGENT'], until=at(40), died=died),
        row('icustays', at(1), 7, until=outtime, stay=9),
        row('chartevents', at(1, 23), 7, ['HR', '90.0'], stay=9),
    ]
    if again:
        rows.append(row('icustays', again, 7, until=at(39), stay=10))
    return rows


@BOTH
@pytest.mark.parametrize('days', [7, 14])
@pytest.mark.parametrize('hours_less, answer', [
    (0, 'yes'),
    (1, 'no'),
])
def test_an_icu_stay_lasts_its_days_or_more(protocol, days, hours_less, answer):
    assert only(icu(days*24 - hours_less), protocol, f'ICU_Stay_{days}day') == answer


@BOTH
def test_icu_readmission(protocol):
    assert first(icu(48, again=at(5)), protocol, 'ICU_Readmission') == 'yes'
    assert only(icu(48), protocol, 'ICU_Readmission') == 'no'


@BOTH
@pytest.mark.parametrize('days', [1, 2, 3, 7, 14])
@pytest.mark.parametrize('days_later, answer', [
    (1, 'yes'),
    (3, 'no'),
    (None, 'no'),
])
def test_icu_mortality(protocol, days, days_later, answer):
    deaths = {}
    if days_later is not None:
        day = days + days_later
        deaths = dict(dod=at(day), died=at(day, 12))
    stay = icu(2000, **deaths)
    assert only(stay, protocol, f'ICU_Mortality_{days}day') == answer


def test_strictly_an_icu_stay_that_ended_is_not_asked():
    assert labels(icu(20), 'strict', 'ICU_Stay_7day') == []
    assert only(icu(20), 'official', 'ICU_Stay_7day') == 'no'


# risks of discharge notes

def readmission(then, kind='EW EMER.', died=None):
    "A discharge on the third day at noon, and perhaps another admission."
    rows = [
        row('patients', cells=PERSON, died=died),
        row('admissions', at(1), 7, ['URGENT'], until=at(3, 12), died=died),
        row('labevents', at(3, 6), 7, ['Sodium']),
        row('discharge', at(3, 13), 7, ['DS', 'text']),
    ]
    if then:
        rows.append(row('admissions', then, 8, [kind], until=None))
    return rows


@BOTH
@pytest.mark.parametrize('days', [30, 60])
@pytest.mark.parametrize('days_later, answer', [
    (2, 'yes'),
    (4, 'no'),
    (None, 'no'),
])
def test_readmission(protocol, days, days_later, answer):
    then = None if days_later is None else at(days + days_later)
    assert only(readmission(then), protocol, f'Readmission_{days}day') == answer


@pytest.mark.parametrize('protocol, answer', [
    ('official', 'yes'),
    ('strict', 'no'),
])
def test_a_planned_readmission_counts_officially_only(protocol, answer):
    assert only(readmission(at(9), 'ELECTIVE'), protocol, 'Readmission_30day') == answer


def test_who_died_in_hospital_is_asked_for_a_readmission_officially_only():
    rows = readmission(None, died=at(3, 12))
    assert only(rows, 'official', 'Readmission_30day') == 'no'
    assert labels(rows, 'strict', 'Readmission_30day') == []


# the index

@pytest.fixture
def two_admissions():
    return [
        *readmission(at(9)),
        row('labevents', at(9, 1), 8, ['Sodium']),
        row('services', at(9, 2), 8, ['MED']),
    ]


def test_the_index_names_the_admission_and_the_last_earlier_discharge_note(two_admissions):
    sample = samples(two_admissions, 'official', 'services').row(0, named=True)
    events = store(two_admissions, 'official').unique('event', keep='first')
    tables = events.sort('event')['table']
    assert tables[sample['admissions_event']] == 'admissions'
    assert tables[sample['discharge_event']] == 'discharge'
    assert sample['admissions_event'] > sample['discharge_event']


def test_a_discharge_note_is_no_earlier_note_of_itself(two_admissions):
    sample = samples(two_admissions, 'official', 'Readmission_30day').row(0, named=True)
    assert sample['discharge_event'] is None


def test_there_are_45_tasks():
    assert len(TASKS) == 45


def test_a_patient_without_events_does_no_harm():
    assert indexed([PATIENT], 'strict').height == 0
    assert Events(store([PATIENT], 'strict')).n == 1
