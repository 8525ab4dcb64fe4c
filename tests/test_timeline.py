"A trajectory shows itself: any patient, nothing unescaped, stays readable across years."
import re
import xml.etree.ElementTree as ET
from datetime import datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_r1.data.events import DISPLAY, FIELD, STORE
from ehr_r1.data.time_axis import time_axis
from ehr_r1.data.timeline import Trajectory
from ehr_r1.data.timeline_drawing import LANES

T, HOUR, DAY = datetime(2150, 1, 1, 8), timedelta(hours=1), timedelta(days=1)
SCHEMA = dict(STORE) | {'table': pl.String}
TAGS = set('div p svg rect title line text path table thead tbody tr th td'.split())


def row(event, table, time=None, cells='', hadm=None, stay=None, until=None, patient=1):
    return dict(subject_id=patient, event=event, table=table, time=time, start=time, end=time,
                hadm_id=hadm, stay_id=stay, cells=cells, until=until, died=None)


def frame(*rows):
    return pl.DataFrame(rows, schema=SCHEMA)


def hourly(count):
    "A laboratory result an hour."
    return [row(i, 'labevents', T + i*HOUR, f'item {i}{FIELD}1') for i in range(count)]


FIRST_STAY = [
    row(0, 'patients', cells='52\x1fF'),
    row(1, 'admissions', T, 'URGENT\x1f\x1f', 11, until=T + 5*DAY),
    row(2, 'icustays', T + DAY, '', 11, 7, T + 3*DAY),
    row(3, 'labevents', T + 30*HOUR, 'Lactate\x1f4.1', 11),
    row(3, 'labevents', T + 30*HOUR, 'Sodium\x1f139', 11),
    row(4, 'diagnoses_icd', None, 'Sepsis\x1f', 11),
]
SECOND_STAY = [
    row(5, 'admissions', T + 4000*DAY, 'ELECTIVE\x1f\x1f', 12, until=T + 4003*DAY),
    row(6, 'emar', T + 4001*DAY, 'Aspirin\x1fAdministered', 12),
]


@pytest.fixture
def years_apart():
    "Two admissions, an ICU stay in the first."
    return frame(*FIRST_STAY, *SECOND_STAY)


@pytest.fixture
def marked(years_apart):
    return Trajectory(years_apart, begin=2, end=4, prediction_time=T + 2*DAY)


def svg(t):
    text = re.search(r'<svg.*</svg>', t._repr_html_(), re.S)[0]
    return ET.fromstring(text.replace('<svg', '<svg xmlns="s"', 1))


def boxes(t):
    return list(svg(t).iter('{s}rect'))


def titles(t):
    return [title.text for title in svg(t).iter('{s}title')]


def titled_boxes(t):
    "Boxes by their tooltips."
    found = [(box.find('{s}title'), box) for box in boxes(t)]
    return {title.text: box for title, box in found if title is not None}


# -- events and stays --------------------------------------------------------------------------------------------------

def test_events_are_counted_with_their_rows(years_apart):
    t = Trajectory(years_apart)
    assert len(t) == 7
    assert t.events.columns == ['event', 'table', 'start', 'end', 'hadm_id', 'rows']
    assert t.events['rows'].to_list() == [1, 1, 1, 2, 1, 1, 1]


def test_stays_are_found(years_apart):
    t = Trajectory(years_apart)
    assert t.admissions.rows() == [(11, T, T + 5*DAY), (12, T + 4000*DAY, T + 4003*DAY)]
    assert t.stays['table'].to_list() == ['admissions', 'icustays', 'admissions']


def test_a_stay_without_an_end_lasts_as_long_as_its_admission_is_seen():
    admission, lab = row(0, 'admissions', T, '', 11), row(1, 'labevents', T + 9*HOUR, 'x', 11)
    t = Trajectory(frame(admission, lab, row(2, 'edstays', T + 10*DAY)))
    assert t.stays.select('start', 'end').rows() == [(T, T + 9*HOUR), (T + 10*DAY, T + 10*DAY)]


def test_slices_keep_their_stays_and_the_window(marked):
    part = marked[3:5]
    assert part.events['event'].to_list() == [3, 4]
    assert part.stays['hadm_id'].to_list() == [11, 11]
    assert (part.begin, part.end) == (2, 4)


def test_slices_take_events_by_position(marked):
    assert marked[-1].events['event'].to_list() == [6]
    assert marked[2:5][1].events['event'].to_list() == [3]
    assert len(marked[:]) == 7
    assert len(marked[4].stays) == 0


@pytest.mark.parametrize('key', [7, -8, slice(9, 12)])
def test_a_slice_without_events_is_refused(marked, key):
    with pytest.raises(IndexError, match='7 events'):
        marked[key]


def test_rows_of_several_patients_are_refused():
    with pytest.raises(ValueError, match='rows of 2 patients'):
        Trajectory(frame(row(0, 'patients'), row(0, 'patients', patient=2)))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match='rows of 0 patients'):
        Trajectory(frame())


def test_rows_without_a_column_of_the_store_are_refused(years_apart):
    with pytest.raises(ValueError, match='column until is missing'):
        Trajectory(years_apart.drop('until'))


# -- whatever comes ----------------------------------------------------------------------------------------------------

ODD_PATIENTS = {
    'nothing but the patient': frame(row(0, 'patients', cells='52\x1fF')),
    'one result': frame(row(0, 'labevents', T, 'Lactate\x1f4.1')),
    'no time': frame(
        row(0, 'patients'), row(1, 'diagnoses_icd', None, 'Sepsis\x1f', 11), row(2, 'drgcodes', None, '', 11)),
    'a stay that ends before it begins': frame(
        row(5, 'patients', cells=None), row(6, 'icustays', T, '', None, 7, T - DAY)),
    'the ends of time': frame(
        row(0, 'emar', datetime(9999, 12, 31, 23, 59), 'x\x1fy'), row(1, 'emar', datetime(1, 1, 1), 'x\x1fy')),
    'a table nobody knows': frame(row(0, 'no_such_table', T, 'x\x1fy')),
    'two stays': frame(*FIRST_STAY, *SECOND_STAY),
    'tables as categories': frame(*FIRST_STAY).with_columns(pl.col('table').cast(pl.Categorical)),
}


@pytest.mark.parametrize('rows', ODD_PATIENTS.values(), ids=ODD_PATIENTS)
@pytest.mark.parametrize('window', [{}, dict(begin=0, end=1, prediction_time=T), dict(begin=50)])
def test_any_patient_can_be_shown(rows, window):
    t = Trajectory(rows, **window)
    page, text = t._repr_html_(), str(t)
    ET.fromstring(page)
    assert f'Patient {t.subject_id}' in page
    assert f'Patient {t.subject_id}' in text
    assert len(text.splitlines()) == 1 + len(t)


def test_rows_without_time_are_listed_though_not_drawn():
    t = Trajectory(ODD_PATIENTS['nothing but the patient'])
    page = t._repr_html_()
    assert '<svg' not in page and 'has a time' in page
    assert 'anchor_age 52, gender F' in str(t)


def test_all_text_is_escaped():
    hostile = '</text></svg><script>alert("1")</script>\'&amp;'
    note = row(0, 'discharge', T, f'DS\x1f{hostile}', 11)
    t = Trajectory(frame(note, row(1, hostile, T + HOUR, hostile), row(2, 'pharmacy', T + 2*HOUR, hostile)))
    page = t._repr_html_()
    assert '<script' not in page and '&lt;script&gt;' in page
    ET.fromstring(page)


@settings(max_examples=60, deadline=None)
@given(
    words=st.text(alphabet=st.characters(exclude_categories=('Cs', 'Cc')), max_size=300),
    table=st.sampled_from(sorted(DISPLAY)),
)
def test_whatever_a_cell_says_it_is_shown_as_text(words, table):
    cells = FIELD.join([words]*max(len(DISPLAY[table].columns), 1))
    page = Trajectory(frame(row(0, table, T, cells)))._repr_html_()
    assert {element.tag for element in ET.fromstring(page).iter()} <= TAGS


# -- the listing -------------------------------------------------------------------------------------------------------

def test_long_texts_and_long_trajectories_are_cut():
    note = row(0, 'discharge', T, 'DS\x1f' + 'word\n'*20_000)
    t = Trajectory(frame(note, *hourly(3000)[1:]))
    page, text = t._repr_html_(), str(t)
    assert len(page) < 300_000 and 'more events' in page
    assert len(text) < 3_000 and 'item 2999' in text
    assert '…' in text.splitlines()[1]


@pytest.fixture
def listing():
    "The lines of a hundred events with a window."
    return str(Trajectory(frame(*hourly(100)), begin=40, end=60)).splitlines()[1:]


def test_the_listing_counts_what_it_leaves_out(listing):
    left_out = sum(int(line.split()[1]) for line in listing if line.strip().startswith('…'))
    shown = sum('item' in line for line in listing)
    assert left_out + shown == 100


def test_the_listing_marks_the_ends_of_the_window(listing):
    marked = [line for line in listing if line.startswith('|')]
    assert marked[0].split()[1] == '40'
    assert marked[-1].startswith('|   59')
    assert any(line.startswith('    60') for line in listing)


# -- the drawing -------------------------------------------------------------------------------------------------------

def test_a_window_is_framed(years_apart, marked):
    def frames(t):
        return [box for box in boxes(t) if box.get('fill') == 'none']

    assert not frames(Trajectory(years_apart))
    assert len(frames(marked)) == 1


def test_the_prediction_time_is_marked(years_apart, marked):
    assert any(title.startswith('prediction time 2150-01-03') for title in titles(marked))
    assert not any(title.startswith('prediction') for title in titles(Trajectory(years_apart)))


def test_what_lies_outside_the_window_fades(marked):
    marks = [box for title, box in titled_boxes(marked).items() if title.startswith('event')]
    assert sorted(mark.get('fill-opacity') for mark in marks) == ['0.3']*3 + ['0.85']*2


def test_a_mark_says_what_it_stands_for(marked):
    assert any('event 3: labevents, 2150-01-02 14:00, 2 rows' in title for title in titles(marked))


def test_the_drawing_names_every_lane(marked):
    words = [text.text for text in svg(marked).iter('{s}text') if text.get('text-anchor') == 'end']
    assert words == ['stays', 'hospital', 'labs', 'drugs', 'ICU']


def test_an_event_that_spans_years_of_nothing_is_two_marks():
    weights = [row(0, 'omr', T, 'Weight\x1f151'), row(0, 'omr', T + 900*DAY, 'Weight\x1f160')]
    said = titles(Trajectory(frame(*weights).with_columns(start=T, end=T + 900*DAY)))
    assert len([title for title in said if title.startswith('event 0: omr')]) == 2
    assert 'nothing for 2.5 y' in said


def test_every_event_is_in_the_drawing():
    tables = [table for lane in LANES.values() for table in lane]
    rows = [row(i, table, T + i*HOUR) for i, table in enumerate(tables)]
    tooltips = [title for title in titles(Trajectory(frame(*rows))) if title.startswith('event')]
    assert sum(tooltip.count('event ') for tooltip in tooltips) == len(rows)


def test_stays_years_apart_are_both_readable(years_apart):
    t = Trajectory(years_apart)
    widths = {title[:12]: float(box.get('width')) for title, box in titled_boxes(t).items()}
    assert widths['admission 11'] > 300
    assert widths['admission 12'] > 200
    assert 'nothing for 10.9 y' in titles(t)


# -- the axis ----------------------------------------------------------------------------------------------------------

def test_stays_years_apart_get_most_of_the_axis():
    axis = time_axis([(T, T + 5*DAY), (T + 4000*DAY, T + 4003*DAY)])
    assert axis(T + 5*DAY) - axis(T) > .5
    assert axis(T + 4003*DAY) - axis(T + 4000*DAY) > .3
    assert len(axis.gaps) == 1


@st.composite
def some_spans(draw):
    "Spans of up to sixty days in eighty years."
    hours = st.tuples(st.integers(0, 80*365*24), st.integers(0, 60*24))
    drawn = draw(st.lists(hours, min_size=1, max_size=80))
    return [(T + start*HOUR, T + (start + length)*HOUR) for start, length in drawn]


@settings(max_examples=100, deadline=None)
@given(some_spans())
def test_axis_keeps_the_order_and_the_range(spans):
    axis = time_axis(spans)
    times = sorted(time for span in spans for time in span)
    places = [axis(time) for time in times]
    assert places == sorted(places)
    assert places[0] >= 0 and places[-1] <= 1 + 1e-9
    assert len(axis.stretches) <= 40


@settings(max_examples=100, deadline=None)
@given(some_spans())
def test_ticks_stand_in_order_from_the_beginning(spans):
    places = [tick.place for tick in time_axis(spans).ticks(860)]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] <= 1
