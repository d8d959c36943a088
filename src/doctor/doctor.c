#include "doctor/doctor.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "doctor/internal.h"
#include "util/cleanup.h"

/* The report. */

#define DOCTOR_SCHEMA 1 /* of the JSON; a new one is not understood by who knows the old */

static void (*const doctor_checks[])(struct doctor *d) = {
    doctor_check_system,      doctor_check_device,     doctor_check_fusermount,
    doctor_check_allow_other, doctor_check_backend,    doctor_check_kvm,
    doctor_check_images,      doctor_check_ssh,        doctor_check_loopback,
    doctor_check_state,       doctor_check_sockets,    doctor_check_processes,
    doctor_check_mounts,      doctor_check_mountpoint,
};

static const char *const doctor_verdicts[] = {
    [DOCTOR_OK] = "ok", [DOCTOR_WARNING] = "warning", [DOCTOR_BROKEN] = "failed"};

void doctor_find(struct doctor *d, const char *check, enum doctor_verdict verdict,
                 const char *remedy, const char *format, ...) {
    struct doctor_finding *findings = realloc(d->findings, (d->count + 1) * sizeof *findings);
    if (!findings)
        return;
    struct doctor_finding *f = &findings[d->count++];
    *f = (struct doctor_finding){.check = check, .verdict = verdict};
    d->findings = findings;
    if (remedy)
        buf_append_str(&f->remedy, remedy);
    va_list args;
    va_start(args, format);
    buf_vprintf(&f->found, format, args);
    va_end(args);
}

static unsigned doctor_tally(const struct doctor *d, enum doctor_verdict verdict) {
    unsigned n = 0;
    for (size_t i = 0; i < d->count; i++)
        n += d->findings[i].verdict == verdict;
    return n;
}

static const char *finding_text(const struct buf *text) {
    return text->len && !text->failed ? text->data : "";
}

/* A path may hold newlines, and what speaks to a terminal; in a report they would be lines of it.
 */
static void finding_print(const char *status, const char *check, const char *before,
                          const struct buf *text) {
    printf("%-8s %-12s %s", status, check, before);
    for (const char *c = finding_text(text); *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            printf("\\x%02x", (unsigned char)*c);
        else
            putchar(*c);
    putchar('\n');
}

static void doctor_print_text(const struct doctor *d) {
    for (size_t i = 0; i < d->count; i++) {
        const struct doctor_finding *f = &d->findings[i];
        finding_print(doctor_verdicts[f->verdict], f->check, "", &f->found);
        if (f->remedy.len)
            finding_print("", "", "remedy: ", &f->remedy);
    }
    unsigned warnings = doctor_tally(d, DOCTOR_WARNING);
    printf("\n%u failed, %u warning%s\n", doctor_tally(d, DOCTOR_BROKEN), warnings,
           warnings == 1 ? "" : "s");
}

/* Text for JSON: a path may hold bytes that are no UTF-8. */
static json_t *finding_json(const struct buf *text) {
    json_t *json = json_string(finding_text(text));
    if (json)
        return json;
    cleanup_buf struct buf ascii = {0};
    for (size_t i = 0; i < text->len; i++) {
        unsigned char c = (unsigned char)text->data[i];
        if (c < 0x80)
            buf_append_char(&ascii, (char)c);
        else
            buf_printf(&ascii, "\\x%02x", c);
    }
    return json_string(finding_text(&ascii));
}

static bool doctor_print_json(const struct doctor *d) {
    json_t *checks = json_array();
    for (size_t i = 0; i < d->count; i++) {
        const struct doctor_finding *f = &d->findings[i];
        json_array_append_new(
            checks, json_pack("{s:s, s:s, s:o, s:o}", "check", f->check, "status",
                              doctor_verdicts[f->verdict], "found", finding_json(&f->found),
                              "remedy", f->remedy.len ? finding_json(&f->remedy) : json_null()));
    }
    json_t *report = json_pack("{s:i, s:s, s:i, s:i, s:o}", "schema", DOCTOR_SCHEMA, "vmsfs",
                               VMSFS_VERSION, "failed", doctor_tally(d, DOCTOR_BROKEN), "warnings",
                               doctor_tally(d, DOCTOR_WARNING), "checks", checks);
    bool ok = report && json_dumpf(report, stdout, JSON_INDENT(2)) == 0;
    printf("\n");
    json_decref(report);
    return ok;
}

int doctor_run(const struct options *options) {
    struct doctor d = {.options = options, .settings = &options->settings};
    for (size_t i = 0; i < sizeof doctor_checks / sizeof *doctor_checks; i++)
        doctor_checks[i](&d);
    bool ok = true;
    if (options->json)
        ok = doctor_print_json(&d);
    else
        doctor_print_text(&d);
    if (!ok || fflush(stdout) != 0) {
        fprintf(stderr, "vmsfs: doctor: its report could not be written\n");
        ok = false;
    }
    int status = ok && !doctor_tally(&d, DOCTOR_BROKEN) ? DOCTOR_HEALTHY : DOCTOR_FAILED;
    for (size_t i = 0; i < d.count; i++) {
        buf_free(&d.findings[i].found);
        buf_free(&d.findings[i].remedy);
    }
    free(d.findings);
    return status;
}
