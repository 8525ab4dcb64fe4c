"A trajectory shows itself: any patient, nothing unescaped, stays readable across years."
import base64
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

T = datetime(2150, 1, 1, 8)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
YEARS = 4000*DAY
SCHEMA = dict(STORE) | {'table': pl.String}
PRINTABLE = st.characters(exclude_categories=('Cs', 'Cc'))
TAGS = set('div p img svg rect title line text path table thead tbody tr th td'.split())


def row(event, table, time=None, cells='', hadm_id=None, stay_id=None, until=None, subject_id=1):
    "A row of the store; an event of one row begins and ends with it."
    return locals() | dict(start=time, end=time, died=None)


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
    row(5, 'admissions', T + YEARS, 'ELECTIVE\x1f\x1f', 12, until=T + YEARS + 3*DAY),
    row(6, 'emar', T + YEARS + DAY, 'Aspirin\x1fAdministered', 12),
]


@pytest.fixture
def years_apart():
    "Two admissions, an ICU stay in the first."
    return frame(*FIRST_STAY, *SECOND_STAY)


@pytest.fixture
def marked(years_apart):
    return Trajectory(years_apart, begin=2, end=4, prediction_time=T + 2*DAY)


def svg(t):
    data = re.search(r'data:image/svg\+xml;base64,([^"]+)', t._repr_html_())[1]
    return ET.fromstring(base64.b64decode(data).decode().replace('http://www.w3.org/2000/svg', 's', 1))


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
    assert t.stays['table'].to_list() == ['admissions', 'icustays', 'admissions']
    first, second = t.admissions.rows()
    assert first == (11, T, T + 5*DAY)
    assert second == (12, T + YEARS, T + YEARS + 3*DAY)


def test_a_stay_without_an_end_lasts_as_long_as_its_admission_is_seen():
    admission = row(0, 'admissions', T, '', 11)
    lab = row(1, 'labevents', T + 9*HOUR, 'x', 11)
    t = Trajectory(frame(admission, lab))
    assert t.stays['end'].item() == T + 9*HOUR


def test_a_stay_of_no_admission_without_an_end_is_a_moment():
    t = Trajectory(frame(row(2, 'edstays', T)))
    assert t.stays['end'].item() == T


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
        Trajectory(frame(row(0, 'patients'), row(0, 'patients', subject_id=2)))


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
        row(0, 'patients'),
        row(1, 'diagnoses_icd', None, 'Sepsis\x1f', 11),
        row(2, 'drgcodes', None, '', 11),
    ),
    'a stay that ends before it begins': frame(
        row(5, 'patients', cells=None),
        row(6, 'icustays', T, '', None, 7, T - DAY),
    ),
    'the ends of time': frame(
        row(0, 'emar', datetime(9999, 12, 31, 23, 59), 'x\x1fy'),
        row(1, 'emar', datetime.min, 'x\x1fy'),
    ),
    'a table nobody knows': frame(row(0, 'no_such_table', T, 'x\x1fy')),
    'two stays': frame(*FIRST_STAY, *SECOND_STAY),
    'tables as categories': frame(*FIRST_STAY).with_columns(pl.col('table').cast(pl.Categorical)),
}


@pytest.mark.parametrize('rows', ODD_PATIENTS.values(), ids=ODD_PATIENTS)
@pytest.mark.parametrize('window', [(), (0, 1, T), (50,)])
def test_any_patient_can_be_shown(rows, window):
    t = Trajectory(rows, *window)
    page, text = t._repr_html_(), str(t)
    ET.fromstring(page)
    assert f'Patient {t.subject_id}' in page
    assert f'Patient {t.subject_id}' in text
    assert len(text.splitlines()) == 1 + len(t)


def test_rows_without_time_are_listed_though_not_drawn():
    t = Trajectory(ODD_PATIENTS['nothing but the patient'])
    page = t._repr_html_()
    assert 'image/svg' not in page and 'has a time' in page
    assert 'anchor_age 52, gender F' in str(t)


def test_all_text_is_escaped():
    hostile = '</text></svg><script>alert("1")</script>\'&amp;'
    note = row(0, 'discharge', T, f'DS\x1f{hostile}', 11)
    unknown = row(1, hostile, T + HOUR, hostile)
    order = row(2, 'pharmacy', T + 2*HOUR, hostile)
    page = Trajectory(frame(note, unknown, order))._repr_html_()
    assert '<script' not in page and '&lt;script&gt;' in page
    ET.fromstring(page)


@settings(max_examples=60, deadline=None)
@given(
    words=st.text(PRINTABLE, max_size=300),
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
    t = Trajectory(frame(*hourly(100)), begin=40, end=60)
    summary, *lines = str(t).splitlines()
    return lines


def test_the_listing_counts_what_it_leaves_out(listing):
    counts = re.findall(r'… +(\d+) more', '\n'.join(listing))
    left_out = sum(map(int, counts))
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
    before, after = row(0, 'omr', T), row(0, 'omr', T + 900*DAY)
    rows = frame(before, after).with_columns(start=T, end=T + 900*DAY)
    said = titles(Trajectory(rows))
    assert len([title for title in said if title.startswith('event 0: omr')]) == 2
    assert 'nothing for 2.5 y' in said


def test_every_event_is_in_the_drawing():
    tables = [table for lane in LANES.values() for table in lane]
    rows = [row(i, table, T + i*HOUR) for i, table in enumerate(tables)]
    said = '\n'.join(titles(Trajectory(frame(*rows))))
    assert len(re.findall('^event ', said, re.M)) == len(rows)


def test_stays_years_apart_are_both_readable(years_apart):
    t = Trajectory(years_apart)
    found = titled_boxes(t).items()
    widths = {title.split(',')[0]: float(box.get('width')) for title, box in found}
    assert widths['admission 11'] > 300
    assert widths['admission 12'] > 200
    assert 'nothing for 10.9 y' in titles(t)


# -- the axis ----------------------------------------------------------------------------------------------------------

def test_stays_years_apart_get_most_of_the_axis():
    first, second = (T, T + 5*DAY), (T + YEARS, T + YEARS + 3*DAY)
    axis = time_axis([first, second])
    assert axis(first[1]) - axis(first[0]) > .5
    assert axis(second[1]) - axis(second[0]) > .3
    assert len(axis.gaps) == 1


@st.composite
def some_spans(draw):
    "Spans of up to sixty days in eighty years."
    starts = st.timedeltas(0*DAY, 80*365*DAY)
    lengths = st.timedeltas(0*DAY, 60*DAY)
    drawn = draw(st.lists(st.tuples(starts, lengths), min_size=1, max_size=80))
    return [(T + start, T + start + length) for start, length in drawn]


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
