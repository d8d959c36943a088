"""Warm boots, beside QEMU that is started by hand and boots cold: one by one, and several at once."""

import os
import statistics
import threading
import time

AT_ONCE = 8
ROUNDS_AT_ONCE = 3
ONE_BUDGET = 1.2  # seconds, median
AT_ONCE_BUDGET = 4.0


def kib(pid):
    """RSS and PSS."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
        fields = dict(line.split(":", 1) for line in f.read().splitlines()[1:])
    return [int(fields[name].split()[0]) for name in ("Rss", "Pss")]


class Warm:
    def __init__(self, vmsfs_class, folder, cleanup, images, by_hand, count, say):
        """`by_hand`: boots QEMU cold until it answers, and returns seconds."""
        path = os.path.join(folder, "warm")
        os.mkdir(path)
        self.vmsfs = vmsfs_class(path, cleanup, options=f"images={images},image=tiny,ephemeral,warm=auto")
        self.by_hand, self.count, self.say = by_hand, count, say
        self.times = {"warm": [], "cold": [], "hand": [], "at once": []}
        self.kib = []

    def boot(self, name):
        seconds = self.vmsfs.boot_timed(name)
        info = self.vmsfs.info(name)
        if not info["warm"]:
            raise RuntimeError(f"{name} booted cold, though there is a template")
        return seconds

    def run(self):
        self.say("warm boots: making the template")
        self.times["cold"].append(self.vmsfs.boot_timed("first"))
        path = os.path.join(self.vmsfs.state, "templates")
        end = time.monotonic() + 120
        while not (os.path.isdir(path) and any(name[0] != "." for name in os.listdir(path))):
            if time.monotonic() > end:
                raise RuntimeError("no template was made")
            time.sleep(0.1)
        self.vmsfs.destroy("first")
        self.say(f"warm boots: {self.count} one by one, {ROUNDS_AT_ONCE} times {AT_ONCE} at once")
        for number in range(self.count):
            self.times["warm"].append(self.boot(f"w{number}"))
            self.vmsfs.destroy(f"w{number}")
            self.times["hand"].append(self.by_hand())
        for _ in range(ROUNDS_AT_ONCE):
            self.boot_at_once()

    def boot_at_once(self):
        names = [f"at-once-{i}" for i in range(AT_ONCE)]
        failed = []

        def boot(name):
            try:
                self.boot(name)
            except (OSError, RuntimeError) as error:
                failed.append(error)
        threads = [threading.Thread(target=boot, args=(name,)) for name in names]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.times["at once"].append(time.perf_counter() - start)
        if failed:
            raise failed[0]
        self.kib = [kib(self.vmsfs.info(name)["pid"]) for name in names]
        for name in names:
            self.vmsfs.destroy(name)

    def print(self, milliseconds):
        median = {name: statistics.median(times) for name, times in self.times.items()}
        worst = max(self.times["warm"])
        rss, pss = (statistics.median(column) / 1024 for column in zip(*self.kib))
        print(f"""
Warm boots (mkdir to running), {self.count} one by one
  from the template: {milliseconds(median["warm"])} ms, at worst {milliseconds(worst)} ms; the first VM, without: \
{milliseconds(median["cold"])} ms; QEMU by hand, cold: {milliseconds(median["hand"])} ms
  {AT_ONCE} at once, until all run: {milliseconds(median["at once"])} ms ({ROUNDS_AT_ONCE} times)
  memory of each of {AT_ONCE}: {rss:.0f} MiB in RSS, {pss:.0f} MiB in PSS""")

    def budgets(self):
        """Name, measured, kept."""
        one, at_once = (statistics.median(self.times[name]) for name in ("warm", "at once"))
        shared = all(pss < 0.75 * rss for rss, pss in self.kib)
        return [
            (f"warm boot: {ONE_BUDGET} s, median of {self.count}", f"{one:.2f} s", one <= ONE_BUDGET),
            (f"    {AT_ONCE} at once: {AT_ONCE_BUDGET:.0f} s", f"{at_once:.2f} s", at_once <= AT_ONCE_BUDGET),
            ("    they share pages: PSS below 3/4 of RSS", f"{max(p / r for r, p in self.kib):.2f}", shared),
        ]
