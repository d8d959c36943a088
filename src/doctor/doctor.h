#pragma once

#include "fuse/options.h"

/* `vmsfs doctor`: looks for what keeps VMs from working here, and says for each thing what was
 * found and what to do about it. It changes nothing, holds no lock, and waits for nobody longer
 * than a few seconds (for a kernel that does not boot, 15); a daemon that runs is not disturbed. */

/* Its exit status: nothing has failed, something has, the command line is wrong. */
enum { DOCTOR_HEALTHY = 0, DOCTOR_FAILED = 1, DOCTOR_USAGE = 2 };

/* Prints the report on stdout, as text or JSON. Returns the exit status. */
int doctor_run(const struct options *options);
