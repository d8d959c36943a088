#pragma once

#include <stdbool.h>
#include <sys/types.h>

#include "doctor/doctor.h"
#include "util/buf.h"

/* Private to src/doctor: what a check is given, and leaves. */

enum doctor_verdict {
    DOCTOR_OK,
    DOCTOR_WARNING, /* something will be slower, or less than it could be */
    DOCTOR_BROKEN,  /* something cannot work */
};

struct doctor {
    const struct options *options;
    const struct settings *settings; /* of the options */
    struct doctor_finding {
        const char *check; /* a constant: stable, for programs */
        enum doctor_verdict verdict;
        struct buf found, remedy; /* owned; the remedy is empty when there is none */
    } * findings;
    size_t count;
};

/* A line of the report. `remedy` is copied; NULL: none. */
void doctor_find(struct doctor *d, const char *check, enum doctor_verdict verdict,
                 const char *remedy, const char *format, ...) __attribute__((format(printf, 5, 6)));

/* Each may leave any number of findings. */
void doctor_check_system(struct doctor *d);
void doctor_check_device(struct doctor *d);
void doctor_check_fusermount(struct doctor *d);
void doctor_check_allow_other(struct doctor *d);
void doctor_check_backend(struct doctor *d);
void doctor_check_kvm(struct doctor *d);
void doctor_check_images(struct doctor *d);
void doctor_check_state(struct doctor *d);
void doctor_check_sockets(struct doctor *d);
void doctor_check_processes(struct doctor *d);
void doctor_check_mounts(struct doctor *d);
void doctor_check_mountpoint(struct doctor *d);
void doctor_check_loopback(struct doctor *d);
void doctor_check_ssh(struct doctor *d);

/* Is this daemon, which has the state directory, mounted nowhere in its own namespace? Then that
 * has been found. */
bool doctor_find_left_daemon(struct doctor *d, const char *state_dir, pid_t daemon);

/* The path of a program, from PATH or where distributions put them; false: it is nowhere. */
bool doctor_find_program(const char *name, struct buf *ret_path);
