"A trajectory shows itself: any patient, nothing unescaped, stays readable across years."
import re
import xml.etree.ElementTree as ET
from datetime import datetime, timedelta
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.data.timeline import LANES, Trajectory, time_axis
from ehr_r1.data.trajectories import DISPLAY

T, HOUR, DAY = datetime(2150, 1, 1, 8), timedelta(hours=1), timedelta(days=1)
SCHEMA = {'subject_id': pl.Int64, 'event': pl.Int32, 'table': pl.String, 'time': pl.Datetime('us'), 'start': pl.Datetime('us'), 'end': pl.Datetime('us'),
          'hadm_id': pl.Int64, 'stay_id': pl.Int64, 'cells': pl.String, 'until': pl.Datetime('us'), 'died': pl.Datetime('us')}

def row(event, table, time=None, cells='', hadm=None, stay=None, until=None, patient=1): return (patient, event, table, time, time, time, hadm, stay, cells, until, None)
def frame(*rows): return pl.DataFrame(list(rows), schema=SCHEMA, orient='row')
def years_apart(): # two admissions, an ICU stay in the first
    return frame(row(0, 'patients', cells='52\x1fF'), row(1, 'admissions', T, 'URGENT\x1f\x1f', 11, until=T + 5*DAY), row(2, 'icustays', T + DAY, '', 11, 7, T + 3*DAY),
                 row(3, 'labevents', T + 30*HOUR, 'Lactate\x1f4.1', 11), row(3, 'labevents', T + 30*HOUR, 'Sodium\x1f139', 11), row(4, 'diagnoses_icd', None, 'Sepsis\x1f', 11),
                 row(5, 'admissions', T + 4000*DAY, 'ELECTIVE\x1f\x1f', 12, until=T + 4003*DAY), row(6, 'emar', T + 4001*DAY, 'Aspirin\x1fAdministered', 12))

def svg(t): return ET.fromstring(re.search(r'<svg.*</svg>', t._repr_html_(), re.S)[0].replace('<svg', '<svg xmlns="s"', 1))
def titles(t): return [e.text for e in svg(t).iter('{s}title')]

def test_events_and_stays():
    t = Trajectory(years_apart())
    assert len(t) == 7 and t.events['rows'].to_list() == [1, 1, 1, 2, 1, 1, 1] and t.events.columns == ['event', 'table', 'start', 'end', 'hadm_id', 'rows']
    assert t.admissions.rows() == [(11, T, T + 5*DAY), (12, T + 4000*DAY, T + 4003*DAY)]
    assert t.stays['table'].to_list() == ['admissions', 'icustays', 'admissions']

def test_a_stay_without_an_end_lasts_as_long_as_its_admission_is_seen():
    t = Trajectory(frame(row(0, 'admissions', T, '', 11), row(1, 'labevents', T + 9*HOUR, 'x', 11), row(2, 'edstays', T + 10*DAY)))
    assert t.stays.select('start', 'end').rows() == [(T, T + 9*HOUR), (T + 10*DAY, T + 10*DAY)]

def test_slices_take_events_and_keep_their_stays():
    t = Trajectory(years_apart(), begin=2, end=4, prediction_time=T + DAY)
    part = t[3:5]
    assert part.events['event'].to_list() == [3, 4] and part.stays['hadm_id'].to_list() == [11, 11] and (part.begin, part.end) == (2, 4)
    assert t[-1].events['event'].to_list() == [6] and len(t[:]) == 7 and t[2:5][1].events['event'].to_list() == [3] and len(t[4].stays) == 0
    for wrong in (7, -8, slice(9, 12)):
        with pytest.raises(IndexError, match='7 events'): t[wrong]

@pytest.mark.parametrize('rows', [
    frame(row(0, 'patients', cells='52\x1fF')),
    frame(row(0, 'labevents', T, 'Lactate\x1f4.1')),
    frame(row(0, 'patients'), row(1, 'diagnoses_icd', None, 'Sepsis\x1f', 11), row(2, 'drgcodes', None, '', 11)),
    frame(row(5, 'patients', cells=None), row(6, 'icustays', T, '', None, 7, T - DAY)),
    frame(row(0, 'emar', datetime(9999, 12, 31, 23, 59), 'x\x1fy'), row(1, 'emar', datetime(1, 1, 1), 'x\x1fy')),
    frame(row(0, 'no_such_table', T, 'x\x1fy')),
    years_apart(), years_apart().with_columns(pl.col('table').cast(pl.Categorical)),
])
def test_any_patient_can_be_shown(rows):
    for t in (Trajectory(rows), Trajectory(rows, 0, 1, T), Trajectory(rows, begin=50)):
        page = t._repr_html_()
        ET.fromstring(page)
        assert f'Patient {t.subject_id}' in page and f'Patient {t.subject_id}' in str(t) and len(str(t).splitlines()) == 1 + len(t)
        t.plot().canvas.draw()

def test_rows_without_time_are_listed_though_not_drawn():
    t = Trajectory(frame(row(0, 'patients', cells='52\x1fF')))
    assert '<svg' not in t._repr_html_() and 'has a time' in t._repr_html_() and 'anchor_age 52, gender F' in str(t)

HOSTILE = '</text></svg><script>alert("1")</script>\'&amp;'
def test_all_text_is_escaped():
    t = Trajectory(frame(row(0, 'discharge', T, f'DS\x1f{HOSTILE}', 11), row(1, HOSTILE, T + HOUR, HOSTILE), row(2, 'pharmacy', T + 2*HOUR, HOSTILE)))
    page = t._repr_html_()
    assert '<script' not in page and '&lt;script&gt;' in page
    ET.fromstring(page)

@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=('Cs', 'Cc')), max_size=300), st.sampled_from(sorted(DISPLAY)))
def test_whatever_a_cell_says_it_is_shown_as_text(words, table):
    root = ET.fromstring(Trajectory(frame(row(0, table, T, '\x1f'.join([words]*max(len(DISPLAY[table].columns), 1)))))._repr_html_())
    assert {e.tag for e in root.iter()} <= set('div p svg rect title line text path table thead tbody tr th td'.split())

def test_long_texts_and_long_trajectories_are_cut():
    t = Trajectory(frame(row(0, 'discharge', T, 'DS\x1f' + 'word\n'*20_000), *[row(i, 'labevents', T + i*HOUR, f'item {i}\x1f1') for i in range(1, 3000)]))
    assert len(t._repr_html_()) < 300_000 and len(str(t)) < 3_000
    assert '…' in str(t).splitlines()[1] and 'more events' in t._repr_html_() and 'item 2999' in str(t)

def test_the_listing_counts_what_it_leaves_out():
    t = Trajectory(frame(*[row(i, 'labevents', T + i*HOUR, f'item {i}\x1f1') for i in range(100)]), begin=40, end=60)
    lines = str(t).splitlines()[1:]
    left_out = sum(int(line.split()[1]) for line in lines if line.strip().startswith('…'))
    assert left_out + sum('item' in line for line in lines) == 100
    assert [line.split()[1] for line in lines if line.startswith('|')][0] == '40' and any(line.startswith('|   59') for line in lines) and any(line.startswith('    60') for line in lines)

def test_window_and_prediction_time_are_marked():
    plain, marked = Trajectory(years_apart()), Trajectory(years_apart(), begin=2, end=4, prediction_time=T + 2*DAY)
    frames = lambda t: [e for e in svg(t).iter('{s}rect') if e.get('fill') == 'none']
    assert not frames(plain) and len(frames(marked)) == 1
    assert any(x.startswith('prediction time 2150-01-03') for x in titles(marked)) and not any(x.startswith('prediction') for x in titles(plain))
    faded = [e.get('fill-opacity') for e in svg(marked).iter('{s}rect') if e.find('{s}title') is not None and e.find('{s}title').text.startswith('event')]
    assert sorted(faded) == ['0.3']*3 + ['0.85']*2
    assert any('event 3: labevents, 2150-01-02 14:00, 2 rows' in x for x in titles(marked))

def test_an_event_that_spans_years_of_nothing_is_two_marks():
    rows = frame(row(0, 'omr', T, 'Weight\x1f151'), row(0, 'omr', T + 900*DAY, 'Weight\x1f160')).with_columns(start=T, end=T + 900*DAY)
    assert len([x for x in titles(Trajectory(rows)) if x.startswith('event 0: omr')]) == 2 and 'nothing for 2.5 y' in titles(Trajectory(rows))

def test_stays_years_apart_are_both_readable():
    axis = time_axis([(T, T + 5*DAY), (T + 4000*DAY, T + 4003*DAY)])
    assert axis(T + 5*DAY) - axis(T) > .5 and axis(T + 4003*DAY) - axis(T + 4000*DAY) > .3 and len(axis.gaps) == 1
    bars = {e.find('{s}title').text[:12]: float(e.get('width')) for e in svg(Trajectory(years_apart())).iter('{s}rect') if e.find('{s}title') is not None}
    assert bars['admission 11'] > 300 and bars['admission 12'] > 200 and any('nothing for 10.9 y' == x for x in titles(Trajectory(years_apart())))

def test_every_event_is_in_the_drawing():
    rows = frame(*[row(i, table, T + i*HOUR) for i, table in enumerate(t for tables in LANES.values() for t in tables)])
    assert sum(len(re.findall('event ', x)) for x in titles(Trajectory(rows)) if x.startswith('event')) == len(rows)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 80*365*24), st.integers(0, 60*24)), min_size=1, max_size=80))
def test_axis_keeps_the_order_and_the_range(hours):
    spans = [(T + a*HOUR, T + (a + b)*HOUR) for a, b in hours]
    axis = time_axis(spans)
    places = [axis(t) for t in sorted(t for span in spans for t in span)]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1 + 1e-9 and len(axis.stretches) <= 40
    ticks = [at for at, _ in axis.ticks(860)]
    assert ticks == sorted(ticks) and all(0 <= at <= 1 for at in ticks) and ticks[:1] == [0.]

def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match='rows of 2 patients'): Trajectory(frame(row(0, 'patients'), row(0, 'patients', patient=2)))
    with pytest.raises(ValueError, match='rows of 0 patients'): Trajectory(frame())
    with pytest.raises(ValueError, match='column until is missing'): Trajectory(years_apart().drop('until'))

def test_figure_holds_every_lane(tmp_path):
    figure = Trajectory(years_apart(), 2, 4, T + 2*DAY).plot(width=8)
    assert [l.get_text() for l in figure.axes[0].get_yticklabels()] == ['stays', 'hospital', 'labs', 'drugs', 'ICU'] and figure.get_size_inches()[0] == 8
    figure.savefig(tmp_path/'timeline.svg'); assert (tmp_path/'timeline.svg').stat().st_size > 5_000
