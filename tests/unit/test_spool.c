#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "util/cleanup.h"
#include "vm/spool.h"

#define DIR "/tmp"

static char byte_at(uint64_t offset) {
    return (char)(offset * 31 + offset / 251);
}

static void fill(char *data, uint64_t offset, size_t length) {
    for (size_t i = 0; i < length; i++)
        data[i] = byte_at(offset + i);
}

static bool is_right(const char *data, uint64_t offset, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (data[i] != byte_at(offset + i))
            return false;
    return true;
}

static void what_was_written_is_read_from_memory_and_from_a_file(void) {
    static char data[70000], got[70000];
    struct spool spool;
    spool_init(&spool, SPOOL_LIMIT_DEFAULT, false);
    for (uint64_t at = 0; at < 300000; at += 7001) {
        fill(data, at, 7001);
        CHECK(spool_write(&spool, DIR, data, 7001) == 0);
        CHECK((spool.fd >= 0) == (spool.end > SPOOL_MEMORY));
        for (uint64_t from = 0; from < spool.end; from += 33333) {
            ssize_t n = spool_read(&spool, from, got, sizeof got);
            CHECK(n > 0 && is_right(got, from, (size_t)n));
        }
        CHECK(spool_read(&spool, spool.end, got, sizeof got) == 0);
    }
    spool_free(&spool);
}

static void what_is_over_the_limit_is_cut_once(void) {
    static char data[100000];
    char got[16];
    struct spool spool;
    fill(data, 0, sizeof data);
    spool_init(&spool, SPOOL_LIMIT_LEAST, false);
    CHECK(spool_write(&spool, DIR, data, 60000) == 0 && !spool.cut);
    CHECK(spool_write(&spool, DIR, data + 60000, 40000) == -EFBIG && spool.cut);
    CHECK(spool.end == SPOOL_LIMIT_LEAST);
    CHECK(spool_write(&spool, DIR, data, 10) == 0 && spool.end == SPOOL_LIMIT_LEAST);
    CHECK(spool_read(&spool, SPOOL_LIMIT_LEAST - 5, got, sizeof got) == 5);
    CHECK(spool_read(&spool, SPOOL_LIMIT_LEAST, got, sizeof got) == -EOVERFLOW);
    spool_free(&spool);
}

static void a_flowing_spool_goes_round_and_keeps_what_was_not_read(void) {
    static char data[65536], got[65536];
    struct spool spool;
    uint64_t read = 0;
    unsigned seed = 1;
    spool_init(&spool, SPOOL_LIMIT_LEAST, true);
    while (spool.end < 20 << 20) {
        while (!spool_is_full(&spool)) {
            size_t length = (size_t)(rand_r(&seed) % (int)sizeof data) + 1;
            fill(data, spool.end, length);
            CHECK(spool_write(&spool, DIR, data, length) == 0);
        }
        while (!spool_has_room(&spool)) {
            ssize_t n = spool_read(&spool, read, got, (size_t)(rand_r(&seed) % 9000) + 1);
            CHECK(n > 0 && is_right(got, read, (size_t)n));
            if (n <= 0)
                return;
            read += (uint64_t)n;
            spool_release(&spool, read);
        }
    }
    CHECK(!spool.cut && spool.start == read);
    CHECK(spool_read(&spool, read - 1, got, 1) == -EOVERFLOW);
    spool_free(&spool);
}

static void a_disk_that_takes_nothing_is_an_error_and_a_cut(void) {
    static char data[40000];
    char got[8];
    struct spool spool;
    fill(data, 0, sizeof data);
    spool_init(&spool, SPOOL_LIMIT_DEFAULT, false);
    CHECK(spool_write(&spool, "/no such folder", data, 10000) == 0);
    CHECK(spool_write(&spool, "/no such folder", data + 10000, 10000) == -ENOENT);
    CHECK(spool.cut && spool.end == 10000);
    CHECK(spool_read(&spool, 9996, got, sizeof got) == 4 && is_right(got, 9996, 4));
    CHECK(spool_read(&spool, 10000, got, sizeof got) == -EOVERFLOW);
    spool_free(&spool);
}

int main(void) {
    what_was_written_is_read_from_memory_and_from_a_file();
    what_is_over_the_limit_is_cut_once();
    a_flowing_spool_goes_round_and_keeps_what_was_not_read();
    a_disk_that_takes_nothing_is_an_error_and_a_cut();
    return check_end();
}
