#include <errno.h>
#include <stdint.h>

#include "check.h"
#include "util/cleanup.h"

static void an_empty_buffer_can_be_freed_cleared_and_consumed(void) {
    struct buf b = {0};
    buf_clear(&b);
    buf_consume(&b, 0);
    CHECK(b.len == 0 && !b.failed);
    buf_free(&b);
    buf_free(&b);
    CHECK(!b.data);
}

static void what_is_appended_is_there_with_a_nul_behind(void) {
    cleanup_buf struct buf b = {0};
    buf_append_str(&b, "ab");
    buf_append_char(&b, '\0');
    buf_append(&b, "cd", 2);
    buf_printf(&b, "%d-%s", 42, "x");
    CHECK(check_same(b.data, b.len, "ab\0cd42-x", 9));
    CHECK(b.data[b.len] == '\0');
    buf_append(&b, NULL, 0);
    CHECK(b.len == 9);
}

static void patching_lays_bytes_over_and_fills_a_gap(void) {
    cleanup_buf struct buf b = {0};
    buf_patch(&b, 2, "cd", 2);
    CHECK(check_same(b.data, b.len, "\0\0cd", 4));
    buf_patch(&b, 0, "ab", 2);
    buf_patch(&b, 3, "DEF", 3);
    CHECK(check_same(b.data, b.len, "abcDEF", 6));
    buf_patch(&b, 1, "B", 1);
    buf_patch(&b, 6, "", 0);
    CHECK(check_same(b.data, b.len, "aBcDEF", 6) && b.data[6] == '\0');
}

static void it_grows_over_many_sizes(void) {
    cleanup_buf struct buf b = {0};
    for (int i = 0; i < 100000; i++)
        buf_append_char(&b, (char)i);
    int wrong = 0;
    for (int i = 0; i < 100000; i++)
        wrong += b.data[i] != (char)i;
    CHECK(b.len == 100000 && !wrong);
}

static void long_formatted_text_is_not_cut(void) {
    cleanup_buf struct buf b = {0};
    buf_append_str(&b, "x");
    buf_printf(&b, "%5000d|", 7);
    CHECK(b.len == 5002 && b.data[5000] == '7' && b.data[5001] == '|' && b.data[5002] == '\0');
}

static void consuming_drops_from_the_front(void) {
    cleanup_buf struct buf b = {0};
    buf_append_str(&b, "hello world");
    buf_consume(&b, 6);
    CHECK(check_same(b.data, b.len, "world", 5));
    CHECK(b.data[5] == '\0');
    buf_consume(&b, 5);
    CHECK(b.len == 0 && b.data[0] == '\0');
}

static void clearing_keeps_the_memory(void) {
    cleanup_buf struct buf b = {0};
    buf_append_str(&b, "hello");
    char *data = b.data;
    buf_clear(&b);
    CHECK(b.len == 0 && b.data == data && *b.data == '\0');
    buf_append_str(&b, "x");
    CHECK(b.data == data && check_same(b.data, b.len, "x", 1));
}

static void stealing_hands_over_and_empties(void) {
    struct buf b = {0};
    size_t length = 99;
    cleanup_free char *nothing = buf_steal(&b, &length);
    CHECK(nothing && length == 0 && *nothing == '\0');
    buf_append_str(&b, "mine");
    cleanup_free char *text = buf_steal(&b, &length);
    CHECK(check_same(text, length, "mine", 4));
    CHECK(!b.data && !b.len && !b.cap);
    cleanup_free char *again = buf_steal(&b, NULL);
    CHECK(again);
}

static void a_failure_stays_until_the_buffer_is_cleared(void) {
    cleanup_buf struct buf b = {0};
    buf_append_str(&b, "kept");
    buf_append(&b, "", SIZE_MAX / 2);
    CHECK(b.failed == -ENOMEM);
    buf_append_str(&b, "more");
    buf_append_char(&b, 'x');
    buf_printf(&b, "%d", 1);
    CHECK(check_same(b.data, b.len, "kept", 4));
    CHECK(!buf_steal(&b, NULL));
    buf_clear(&b);
    buf_append_str(&b, "good");
    CHECK(!b.failed && check_same(b.data, b.len, "good", 4));
}

int main(void) {
    an_empty_buffer_can_be_freed_cleared_and_consumed();
    what_is_appended_is_there_with_a_nul_behind();
    patching_lays_bytes_over_and_fills_a_gap();
    it_grows_over_many_sizes();
    long_formatted_text_is_not_cut();
    consuming_drops_from_the_front();
    clearing_keeps_the_memory();
    stealing_hands_over_and_empties();
    a_failure_stays_until_the_buffer_is_cleared();
    return check_end();
}
