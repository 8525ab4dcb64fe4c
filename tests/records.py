"Small patients for tests, as trajectory rows."
from datetime import datetime, timedelta
import numpy as np, polars as pl
from ehr_r1.data.trajectories import DISPLAY, FIELD, ITEM, MERGED, MODULES_IN_ORDER, TIE, number_events, order_rows

def at(day, hour=0, minute=0): return datetime(2150, 1, 1) + timedelta(days=day - 1, hours=hour, minutes=minute)

def row(table, time=None, hadm=None, cells=(), until=None, died=None, stay=None, subject=1, n=0):
    "One row; `cells` may name columns: dict(item_name='Sodium')."
    columns = DISPLAY[table].columns
    cells = [cells.get(c, '') for c in columns] if isinstance(cells, dict) else [*cells, *['']*(len(columns) - len(cells))]
    order = MODULES_IN_ORDER.index(DISPLAY[table].module)*2**61 + ((stay or 0) % 2**26)*2**35 + TIE[table]*2**30 + n
    return dict(subject_id=subject, table=table, time=time, order=order, hadm_id=hadm, stay_id=stay, cells=FIELD.join(cells), until=until, died=died)

def merged(rows): return pl.DataFrame(rows, schema=MERGED)
def store(rows, protocol): return number_events(order_rows(rows if isinstance(rows, pl.DataFrame) else merged(rows), protocol), protocol)

def random_rows(seed, subjects=3):
    "Patients with ED stays, admissions, ICU stays and everything around them, on a coarse grid so that ties are common."
    rng, rows = np.random.default_rng(seed), []
    for s in range(1, subjects + 1):
        death = at(30, 12) if rng.random() < .3 else None
        rows.append(row('patients', cells=['60.0', 'F'], died=death and at(30), subject=s))
        day = 1
        for k in range(rng.integers(1, 4)):
            hadm, ed, icu = s*100 + k, s*1000 + k, s*2000 + k
            admitted = rng.random() < .8
            start, length = at(day, int(rng.integers(0, 20))), int(rng.integers(6, 120))
            out, end = start + timedelta(hours=int(rng.integers(2, 10))), start + timedelta(hours=length + 10)
            anywhere = lambda a, b: a + timedelta(minutes=30*int(rng.integers(0, max(1, (b - a).total_seconds()//1800))))
            rows.append(row('edstays', start, hadm if admitted else None, ['F', 'WHITE'], until=out, stay=ed, subject=s))
            rows.append(row('triage', start + timedelta(seconds=1), None, ['98.6', '90.0'], stay=ed, subject=s))
            for t in ('vitalsign', 'pyxis', 'medrecon'):
                for _ in range(rng.integers(0, 4)): rows.append(row(t, anywhere(start, out), None, [str(rng.integers(50, 99))], stay=ed, subject=s))
            rows.append(row('diagnosis', out, None, ['SEPSIS', 'Septicemia'], stay=ed, subject=s))
            inside = hadm if admitted else None
            for t in ('labevents', 'microbiologyevents', 'poe', 'pharmacy', 'prescriptions', 'emar', 'transfers', 'services', 'radiology', 'chartevents', 'procedures_icd', 'omr'):
                for _ in range(rng.integers(0, 8)):
                    rows.append(row(t, anywhere(start, end), None if t == 'omr' or t == 'labevents' and rng.random() < .2 else inside, [f'{t} {rng.integers(5)}', str(rng.integers(90)), str(rng.integers(9))][:len(DISPLAY[t].columns)], stay=icu if t == 'chartevents' else None, subject=s, n=len(rows)))
            if admitted:
                rows.append(row('admissions', out - timedelta(hours=int(rng.integers(0, 3))), hadm, ['EW EMER.', 'EMERGENCY ROOM'], until=end, died=end if death and k == 0 and rng.random() < .5 else None, subject=s))
                rows.append(row('icustays', anywhere(out - timedelta(hours=2), out + timedelta(hours=20)), hadm, until=end, stay=icu, subject=s))
                rows.append(row('discharge', end + timedelta(hours=int(rng.integers(0, 30))), hadm, ['DS', f'note {k}'], subject=s, n=k))
                rows += [row('diagnoses_icd', None, hadm, ['Sepsis', 'Septicemia'], subject=s, n=i) for i in range(2)] + [row('drgcodes', None, hadm, subject=s)]
            day += int(rng.integers(2, 40))
    return merged(rows)
