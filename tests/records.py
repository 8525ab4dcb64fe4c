"Small patients for tests, as trajectory rows."
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from ehr_r1.data.events import DISPLAY, FIELD, MERGED, MODULES_IN_ORDER, TIE
from ehr_r1.data.trajectories import number_events, order_rows

AROUND_A_STAY = (
    'labevents', 'microbiologyevents', 'poe', 'pharmacy', 'prescriptions', 'emar', 'transfers', 'services',
    'radiology', 'chartevents', 'procedures_icd', 'omr',
)


def at(day, hour=0, minute=0):
    "A moment, counted from the first of January 2150."
    return datetime(2150, 1, 1) + timedelta(days=day - 1, hours=hour, minutes=minute)


def row(table, time=None, hadm=None, cells=(), until=None, died=None, stay=None, subject=1, n=0):
    "One row; `cells` may name columns: dict(item_name='Sodium')."
    display = DISPLAY[table]
    if isinstance(cells, dict):
        cells = [cells.get(column, '') for column in display.columns]
    missing = [''] * (len(display.columns) - len(cells))
    module = MODULES_IN_ORDER.index(display.module)
    order = module * 2**61 + (stay or 0) % 2**26 * 2**35 + TIE[table] * 2**30 + n
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
        self.hadm, self.ed, self.icu = subject * 100 + number, subject * 1000 + number, subject * 2000 + number
        self.number = number
        self.is_admitted = rng.random() < .8
        hour, length = int(rng.integers(0, 20)), int(rng.integers(6, 120))
        self.start = at(day, hour)
        self.out = self.start + timedelta(hours=int(rng.integers(2, 10)))
        self.end = self.start + timedelta(hours=length + 10)

    def add(self, table, *args, **kwargs):
        self.rows.append(row(table, *args, subject=self.subject, **kwargs))

    def between(self, start, end):
        "A random moment."
        half_hours = max(1, (end - start).total_seconds() // 1800)
        return start + timedelta(minutes=30 * int(self.rng.integers(0, half_hours)))

    def add_emergency(self):
        hadm = self.hadm if self.is_admitted else None
        self.add('edstays', self.start, hadm, ['F', 'WHITE'], until=self.out, stay=self.ed)
        self.add('triage', self.start + timedelta(seconds=1), None, ['98.6', '90.0'], stay=self.ed)
        for table in ('vitalsign', 'pyxis', 'medrecon'):
            for _ in range(self.rng.integers(0, 4)):
                time = self.between(self.start, self.out)
                self.add(table, time, None, [str(self.rng.integers(50, 99))], stay=self.ed)
        self.add('diagnosis', self.out, None, ['SEPSIS', 'Septicemia'], stay=self.ed)

    def add_care(self):
        for table in AROUND_A_STAY:
            for _ in range(self.rng.integers(0, 8)):
                self.add_event(table)

    def add_event(self, table):
        rng, time = self.rng, self.between(self.start, self.end)
        is_outside = table == 'omr' or table == 'labevents' and rng.random() < .2
        hadm = self.hadm if self.is_admitted and not is_outside else None
        cells = [f'{table} {rng.integers(5)}', str(rng.integers(90)), str(rng.integers(9))]
        stay = self.icu if table == 'chartevents' else None
        self.add(table, time, hadm, cells[:len(DISPLAY[table].columns)], stay=stay, n=len(self.rows))

    def add_admission(self, death):
        rng = self.rng
        admitted = self.out - timedelta(hours=int(rng.integers(0, 3)))
        died = self.end if death and self.number == 0 and rng.random() < .5 else None
        self.add('admissions', admitted, self.hadm, ['EW EMER.', 'EMERGENCY ROOM'], until=self.end, died=died)
        moved = self.between(self.out - timedelta(hours=2), self.out + timedelta(hours=20))
        self.add('icustays', moved, self.hadm, until=self.end, stay=self.icu)
        written = self.end + timedelta(hours=int(rng.integers(0, 30)))
        self.add('discharge', written, self.hadm, ['DS', f'note {self.number}'], n=self.number)
        for n in range(2):
            self.add('diagnoses_icd', None, self.hadm, ['Sepsis', 'Septicemia'], n=n)
        self.add('drgcodes', None, self.hadm)


def random_rows(seed, subjects=3):
    "Patients with ED stays, admissions, ICU stays and everything around them."
    rng, rows = np.random.default_rng(seed), []
    for subject in range(1, subjects + 1):
        death = at(30, 12) if rng.random() < .3 else None
        rows.append(row('patients', cells=['60.0', 'F'], died=death and at(30), subject=subject))
        day = 1
        for number in range(rng.integers(1, 4)):
            visit = Visit(rng, subject, number, day, rows)
            visit.add_emergency()
            visit.add_care()
            if visit.is_admitted:
                visit.add_admission(death)
            day += int(rng.integers(2, 40))
    return merged(rows)
