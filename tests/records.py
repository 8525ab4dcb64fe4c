"Small patients for tests, as trajectory rows."
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from ehr_r1.data.events import DISPLAY, FIELD, MERGED, MODULES_IN_ORDER, TABLE_ORDER
from ehr_r1.data.row_order import number_events, order_rows

FIRST_DAY = datetime(2150, 1, 1)
AROUND_A_STAY = (
    'labevents', 'microbiologyevents', 'poe', 'pharmacy', 'prescriptions', 'emar', 'transfers', 'services',
    'radiology', 'chartevents', 'procedures_icd', 'omr',
)


def at(day, hour=0, minute=0):
    "A moment, counted from the first of January 2150."
    return FIRST_DAY + timedelta(days=day - 1, hours=hour, minutes=minute)


def row(table, time=None, hadm=None, cells=(), until=None, died=None, stay=None, subject=1, n=0):
    "One row; `cells` may name columns: dict(item_name='Sodium')."
    display = DISPLAY[table]
    if isinstance(cells, dict):
        cells = [cells.get(column, '') for column in display.columns]
    missing = [''] * (len(display.columns) - len(cells))
    module = MODULES_IN_ORDER.index(display.module)
    order = module * 2**61 + n
    order += (stay or 0) % 2**26 * 2**35
    order += TABLE_ORDER[table] * 2**30
    return dict(
        subject_id=subject,
        table=table,
        time=time,
        order=order,
        hadm_id=hadm,
        stay_id=stay,
        cells=FIELD.join([*cells, *missing]),
        until=until,
        died=died,
    )


def merged(rows):
    "Rows as a frame, not yet in order."
    return pl.DataFrame(rows, schema=MERGED)


def store(rows, protocol):
    "Rows as the trajectory store has them."
    frame = rows if isinstance(rows, pl.DataFrame) else merged(rows)
    return number_events(order_rows(frame, protocol), protocol)


class Visit:
    "An ED visit of a random patient, which may become an admission; a grid of half hours makes ties common."

    def __init__(self, rng, subject, number, day, rows):
        self.rng, self.subject, self.rows = rng, subject, rows
        self.number = number
        self.hadm = subject * 100 + number
        self.ed = subject * 1000 + number
        self.icu = subject * 2000 + number
        self.is_admitted = rng.random() < .8
        self.start = at(day, self.draw(0, 20))
        self.end = self.start + timedelta(hours=self.draw(6, 120) + 10)
        self.out = self.start + timedelta(hours=self.draw(2, 10))

    def add(self, table, *args, **kwargs):
        self.rows.append(row(table, *args, subject=self.subject, **kwargs))

    def draw(self, low, high):
        "A whole number below `high`."
        return int(self.rng.integers(low, high))

    def between(self, start, end):
        "A random moment."
        half_hours = max(1, (end - start).total_seconds() // 1800)
        return start + timedelta(minutes=30 * self.draw(0, half_hours))

    def add_emergency(self):
        hadm = self.hadm if self.is_admitted else None
        self.add('edstays', self.start, hadm, ['F', 'WHITE'], until=self.out, stay=self.ed)
        self.add('triage', self.start + timedelta(seconds=1), None, ['98.6', '90.0'], stay=self.ed)
        for table in ('vitalsign', 'pyxis', 'medrecon'):
            for _ in range(self.draw(0, 4)):
                time = self.between(self.start, self.out)
                value = str(self.draw(50, 99))
                self.add(table, time, None, [value], stay=self.ed)
        self.add('diagnosis', self.out, None, ['SEPSIS', 'Septicemia'], stay=self.ed)

    def add_care(self):
        for table in AROUND_A_STAY:
            for _ in range(self.draw(0, 8)):
                self.add_event(table)

    def add_event(self, table):
        rng, time = self.rng, self.between(self.start, self.end)
        is_outside = table == 'omr' or table == 'labevents' and rng.random() < .2
        hadm = self.hadm if self.is_admitted and not is_outside else None
        cells = [f'{table} {self.draw(0, 5)}', str(self.draw(0, 90)), str(self.draw(0, 9))]
        cells = cells[:len(DISPLAY[table].columns)]
        stay = self.icu if table == 'chartevents' else None
        self.add(table, time, hadm, cells, stay=stay, n=len(self.rows))

    def add_admission(self, death):
        rng = self.rng
        admitted = self.out - timedelta(hours=self.draw(0, 3))
        died = self.end if death and self.number == 0 and rng.random() < .5 else None
        cells = ['EW EMER.', 'EMERGENCY ROOM']
        self.add('admissions', admitted, self.hadm, cells, until=self.end, died=died)
        moved = self.between(self.out - timedelta(hours=2), self.out + timedelta(hours=20))
        self.add('icustays', moved, self.hadm, until=self.end, stay=self.icu)
        written = self.end + timedelta(hours=self.draw(0, 30))
        self.add('discharge', written, self.hadm, ['DS', f'note {self.number}'], n=self.number)
        for n in range(2):
            self.add('diagnoses_icd', None, self.hadm, ['Sepsis', 'Septicemia'], n=n)
        self.add('drgcodes', None, self.hadm)


def random_rows(seed, subjects=3):
    "Patients with ED stays, admissions, ICU stays and everything around them."
    rng, rows = np.random.default_rng(seed), []
    for subject in range(1, subjects + 1):
        death = at(30, 12) if rng.random() < .3 else None
        died = at(30) if death else None
        rows.append(row('patients', cells=['60.0', 'F'], died=died, subject=subject))
        day = 1
        for number in range(rng.integers(1, 4)):
            visit = Visit(rng, subject, number, day, rows)
            visit.add_emergency()
            visit.add_care()
            if visit.is_admitted:
                visit.add_admission(death)
            day += int(rng.integers(2, 40))
    return merged(rows)
