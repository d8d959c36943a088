#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "check.h"
#include "guest/dotenv.h"
#include "util/cleanup.h"
#include "util/errors.h"

/* test_dotenv [ROUNDS [SEED]]: how many random files go through the shells, and how to repeat it.
 */

#define S(literal) literal, sizeof(literal) - 1
#define SECRET "s3cr3t"
#define RANDOM_VARS 8

/* All of them must be installed: the promise of `. environ` is about these. */
static const char *const shells[] = {"dash", "bash", "busybox sh", "zsh", "ksh"};

static char path[] = "/tmp/vmsfs-test-dotenv-XXXXXX";
static unsigned long rounds = 20, seed;

/* --- Helpers --- */

static unsigned below(unsigned limit) {
    seed = seed * 6364136223846793005ul + 1442695040888963407ul;
    return (unsigned)(seed >> 33) % limit;
}

static void add(struct buf *all, const char *name, size_t name_length, const char *value,
                size_t length) {
    buf_append(all, name, name_length);
    buf_append_char(all, '=');
    buf_append(all, value, length);
    buf_append_char(all, '\0');
}

/* Gathers variables as `NAME=value` with a NUL behind each. */
static int gather(void *arg, const struct env_var *var) {
    CHECK(var->value);
    add(arg, var->name, var->name_length, var->value, var->length);
    return 0;
}

/* A copy without a byte behind it, so that the sanitizer sees every read out of bounds. */
static int parse(const char *text, size_t length, struct buf *vars, struct dotenv_error *error) {
    cleanup_free char *copy = malloc(length ? length : 1);
    memcpy(copy, text, length);
    return dotenv_parse(copy, length, gather, vars, error);
}

static void reads(int line, const char *text, size_t length, const char *vars, size_t vars_length) {
    cleanup_buf struct buf got = {0};
    struct dotenv_error error = {0};
    int status = parse(text, length, &got, &error);
    check_at(__FILE__, line, status == 0, "<%s> is refused: %u: %s", text, error.line, error.text);
    check_at(__FILE__, line, check_same(got.data, got.len, vars, vars_length),
             "variables of <%s> are <%s> and %zu bytes", text, got.data ? got.data : "", got.len);
}

#define READS(text, vars) reads(__LINE__, S(text), S(vars))

/* Refused in this line; the error's text has these words, but never the secret. */
static void refuses(int line, const char *text, size_t length, unsigned bad_line,
                    const char *words) {
    cleanup_buf struct buf got = {0};
    struct dotenv_error error = {.line = 77, .incomplete = true, .in_name = true}, again;
    int status = parse(text, length, &got, &error);
    check_at(__FILE__, line, status == -ERR_INVALID, "<%s> has status %d", text, status);
    check_at(__FILE__, line, error.line == bad_line, "<%s>: line %u", text, error.line);
    check_at(__FILE__, line, strstr(error.text, words) && !strstr(error.text, SECRET),
             "<%s>: text <%s>", text, error.text);
    check_at(__FILE__, line, strlen(error.text) < sizeof error.text - 1, "<%s> is cut", error.text);
    check_at(__FILE__, line, !error.incomplete && !error.in_name, "<%s> could go on", text);

    /* The same behind good statements, one of which has three lines. */
    cleanup_buf struct buf later = {0};
    buf_append_str(&later, "# x\n\nFIRST='a\nb\nc'\nSECOND=2\r\n");
    buf_append(&later, text, length);
    buf_append_str(&later, "\nTHIRD=3\n");
    buf_clear(&got);
    status = parse(later.data, later.len, &got, &again);
    check_at(__FILE__, line, status == -ERR_INVALID, "later <%s> has status %d", text, status);
    check_at(__FILE__, line, again.line == bad_line + 6, "later <%s>: line %u", text, again.line);
    check_at(__FILE__, line, !strcmp(again.text, error.text), "later <%s>: %s", text, again.text);
    static const char before[] = "FIRST=a\nb\nc\0SECOND=2";
    check_at(__FILE__, line, got.len >= sizeof before && !memcmp(got.data, before, sizeof before),
             "what stands before <%s> is not read", text);
}

#define REFUSES(text, line, words) refuses(__LINE__, S(text), line, words)

/* A text that ends too early: inside a value, or before the `=`. */
static void ends_early(int line, const char *text, bool in_value) {
    cleanup_buf struct buf got = {0};
    struct dotenv_error error = {0};
    int status = parse(text, strlen(text), &got, &error);
    check_at(__FILE__, line, status == -ERR_INVALID, "<%s> has status %d", text, status);
    check_at(__FILE__, line, error.incomplete == in_value && error.in_name == !in_value,
             "<%s>: incomplete %d, in_name %d", text, error.incomplete, error.in_name);
    check_at(__FILE__, line, !strstr(error.text, SECRET), "<%s>", error.text);
}

#define ENDS_IN_VALUE(text) ends_early(__LINE__, text, true)
#define ENDS_IN_NAME(text) ends_early(__LINE__, text, false)

/* What a shell adds to the environment by sourcing `text`, sorted, without what it always adds. */
static struct buf shell_environment(const char *shell, const struct buf *text) {
    FILE *f = fopen(path, "w");
    CHECK(f && fwrite(text->data, 1, text->len, f) == text->len && !fclose(f));
    cleanup_buf struct buf command = {0};
    buf_printf(&command,
               "env -i PATH=\"$PATH\" %s -c 'set -a; . %s; exec env -0' | LC_ALL=C sort -z |"
               " LC_ALL=C grep -avzE '^(PATH|PWD|OLDPWD|SHLVL|HOME|LOGNAME|_|A__z)='",
               shell, path);
    struct buf got = {0};
    f = popen(command.data, "r");
    char block[4096];
    for (size_t n; f && (n = fread(block, 1, sizeof block, f));)
        buf_append(&got, block, n);
    CHECK_SAID(f && pclose(f) == 0, "%s failed on the file", shell);
    return got;
}

static void shells_have(const char *what, const struct buf *text, const struct buf *expected) {
    for (size_t i = 0; i < sizeof shells / sizeof *shells; i++) {
        cleanup_buf struct buf got = shell_environment(shells[i], text);
        bool same = check_same(got.data, got.len, expected->data, expected->len);
        CHECK_SAID(same, "%s: %s has something else after sourcing %s", what, shells[i], path);
        if (!same) { /* keep what failed */
            fprintf(stderr, "<%s>\nexpected (%zu) <%s>\ngot (%zu) <%s>\n", text->data,
                    expected->len, expected->data, got.len, got.data ? got.data : "");
            exit(1);
        }
    }
}

/* --- Tests --- */

static void a_written_text_looks_as_documented(void) {
    const struct env_var vars[] = {{S("B"), S("it's")}, {S("A"), S("")}, {S("C"), S("x\n")}};
    cleanup_buf struct buf text = {0};
    dotenv_format(&text, vars, 0);
    CHECK(!text.len);
    dotenv_format(&text, vars, 3);
    CHECK_SAID(check_same(text.data, text.len, S("B='it'\\''s'\nA=''\nC='x\n'\n")), "<%s>",
               text.data);
    READS("B='it'\\''s'\nA=''\nC='x\n'\n", "B=it's\0A=\0C=x\n\0");
}

static void a_bare_value_is_the_rest_of_the_line(void) {
    READS("", "");
    READS("A=1", "A=1\0");
    READS("A=1\nB=2\n", "A=1\0B=2\0");
    READS("A=\nB= \t\nC= # x\nD=\t#\n", "A=\0B=\0C=\0D=\0");
    READS("A=x y  z \t\n", "A=x y  z\0");
    READS("A=x # why\nB=x\t#\nC=x#y #z\nD=#x\n", "A=x\0B=x\0C=x#y\0D=#x\0");
    READS("A=it's \"so\" 'b c'\n", "A=it's \"so\" 'b c'\0");
    READS("A=C:\\dir\\new\\\nB={\"a\": [\"b c\"]}\n", "A=C:\\dir\\new\\\0B={\"a\": [\"b c\"]}\0");
    READS("A=a;b&c|d<e>f(g)~*?!\nB=~/x\nC==\n", "A=a;b&c|d<e>f(g)~*?!\0B=~/x\0C==\0");
    READS("A=$\nB=pa$$1$?x$ $'y' \\$\n", "A=$\0B=pa$$1$?x$ $'y' \\$\0");
    READS("A=\xc3\xa4\xff\x01\v\n", "A=\xc3\xa4\xff\x01\v\0");
    READS("A=1 B=2\n", "A=1 B=2\0");
}

static void a_quoted_value_is_a_word_of_sh(void) {
    READS("A='x y' # why\nB=\"x y\"\t\n", "A=x y\0B=x y\0");
    READS("A='a\n\n# b\nC=1\n'\nB=\"a\nb\n\"\n", "A=a\n\n# b\nC=1\n\0B=a\nb\n\0");
    READS("A=\"\"", "A=\0");
    READS("A=''\nB=\"\"\nC=''\"\"''", "A=\0B=\0C=\0");
    READS("A='a'b\"c\"\\ \\'\\\"\\$HOME'd'#e\n", "A=abc '\"$HOMEd#e\0");
    READS("A='it'\"'\"'s'\nB='it'\\''s'\n", "A=it's\0B=it's\0");
    READS("A=\"\\\"\\\\\\$HOME\\`\"\n", "A=\"\\$HOME`\0");
    READS("A=\"a\\nb\\rc\\td\\x\\0\\a\\'\"\n", "A=a\nb\rc\td\\x\\0\\a\\'\0");
    READS("A='a\\nb\\\\'\nB=''\\n\\\\\n", "A=a\\nb\\\\\0B=n\\\0");
    READS("A=\"a\\\nb\"\nB='a'\\\n'b'\nC='a\\\nb'\n", "A=ab\0B=ab\0C=a\\\nb\0");
    READS("A='$HOME `x` $(y)'\nB=\"$ $1 $$ 5$\"$\n", "A=$HOME `x` $(y)\0B=$ $1 $$ 5$$\0");
    READS("A=\"'\"'\"'\n", "A='\"\0");
    READS("A=\"a'b\"\nB='a\"b'\n", "A=a'b\0B=a\"b\0");
}

static void lines_around_statements_are_as_in_dotenv_files(void) {
    READS("\n \t\n# A=1\n  # it's $HOME `\nA=1\n\n", "A=1\0");
    READS("export A=1\n \texport \t B='2'\nexport export=3\nexport=4",
          "A=1\0B=2\0export=3\0export=4\0");
    READS("  A=1\n\t_b9=2\n", "A=1\0_b9=2\0");
    READS("set -a\nA=1\nset +a \r\nB=2", "A=1\0B=2\0");
    REFUSES("set -e\n", 1, "no = in this line");
    READS("exportA=1\nexports=2\n", "exportA=1\0exports=2\0");
    READS("A=1\nB=2\nA='3'\n", "A=1\0B=2\0A=3\0");
    READS("\xef\xbb\xbf"
          "A=1\n",
          "A=1\0");
    READS("\xef\xbb\xbf", "");
    READS("\r\nA=1\r\n# x\r\nB='2'\r\n \r\nC=x y \r\nD='z' # w\r\nE=\r\nF='' \r\nG=1\r",
          "A=1\0B=2\0C=x y\0D=z\0E=\0F=\0G=1\0");
    READS("A='1\r\n2\r'\r\nB=\"\r\n\"\r", "A=1\r\n2\r\0B=\r\n\0");
    READS("A=x\ry\r\r\nB='x'\ry\r\r\n\r", "A=x\ry\r\0B=x\ry\r\0");
}

static void bad_lines_are_refused_with_their_number(void) {
    REFUSES(SECRET "\n", 1, "no = in this line");
    REFUSES("# x\n\nA=1\n" SECRET " x\n", 4, "no = in this line");
    REFUSES("A='1\n2\n3'\nB=\"\n\"\n" SECRET ".\n", 6, "no = in this line");
    REFUSES("A=\"1\\\n2\"\n" SECRET "\r\n", 3, "no = in this line");
    REFUSES("export\n", 1, "no = in this line");
    REFUSES("export # x\n", 1, "no = in this line");
    REFUSES("export A B\n", 1, "no = in this line");
    REFUSES("export A#B\n", 1, "no = in this line");
    REFUSES("export A\n", 1, "A: no value: ");
    REFUSES("A=1\nexport\tAB \t\r\n", 2, "AB: no value: ");
    REFUSES("export AB # x\n", 1, "AB: no value: ");
    REFUSES("KEY = " SECRET "\n", 1, "KEY: no blanks around =");
    REFUSES("KEY\t=" SECRET "\n", 1, "KEY: no blanks around =");
    REFUSES("KEY= " SECRET " # x\n", 1, "KEY: no blanks around =");
    REFUSES("KEY= '" SECRET "'\n", 1, "KEY: no blanks around =");
    REFUSES("export export = " SECRET "\n", 1, "export: no blanks around =");
    REFUSES("export = " SECRET "\n", 1, "export: no blanks around =");
    REFUSES("1A=" SECRET "\n", 1, "bad name before =");
    REFUSES("=" SECRET "\n", 1, "bad name before =");
    REFUSES("export =" SECRET "\n", 1, "export: no blanks around =");
    REFUSES(SECRET "/x==\n", 1, "bad name before =");
    REFUSES("A-B=1\n", 1, "bad name before =");
    REFUSES("A.B=1\n", 1, "bad name before =");
    REFUSES("A+=1\n", 1, "bad name before =");
    REFUSES("\xc3\xa4=1\n", 1, "bad name before =");
    REFUSES("export -x A=1\n", 1, "bad name before =");
    REFUSES("export A B=1\n", 1, "bad name before =");
    REFUSES("'A'=1\n", 1, "bad name before =");
    REFUSES("\rA=1\n", 1, "bad name before =");
    REFUSES("A=1\n\xef\xbb\xbf"
            "B=1\n",
            2, "bad name before =");
    REFUSES("A='" SECRET "' x\n", 1, "A: text after the closing quote");
    REFUSES("A=\"1\n" SECRET "\" 'x\n", 1, "A: text after the closing quote");
    REFUSES("A='" SECRET "';\n", 1, "A: text after the closing quote");
    REFUSES("A='" SECRET "')\n", 1, "A: text after the closing quote");
    REFUSES("A='" SECRET "';#x\n", 1, "A: text after the closing quote");
    REFUSES("export A='" SECRET "' B='x'\n", 1, "A: text after the closing quote");
    REFUSES("A='" SECRET "'&& x\n", 1, "A: text after the closing quote");
    REFUSES("A='x' \\\n" SECRET "\n", 1, "A: text after the closing quote");
    REFUSES("A='x'\nB='it's" SECRET " and it's'\n", 2, "B: text after the closing quote");
}

static void expansions_are_refused(void) {
    static const char *const starts[] = {"$a", "$Z", "$_", "${", "$(", "`", "$HOME", "a$b", "$$a"};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        static const char *const forms[] = {"%s" SECRET, "x\\%s " SECRET, "\"%s" SECRET "\"",
                                            "'x'%s" SECRET, "\"\\\\%s" SECRET "\n\""};
        for (size_t j = 0; j < sizeof forms / sizeof *forms; j++) {
            if (j == 1 && strchr("a$", starts[i][0]) && strcmp(starts[i], "$a"))
                continue;
            cleanup_buf struct buf text = {0};
            const char *at = strstr(forms[j], "%s");
            buf_printf(&text, "A='\n'\nKEY=%.*s%s%s\n", (int)(at - forms[j]), forms[j], starts[i],
                       at + 2);
            refuses(__LINE__, text.data, text.len, 3, "in double quotes");
        }
    }
    REFUSES("A=\"$\\\n\\\n" SECRET "\"\n", 1, "A: $ is not expanded");
    REFUSES("A=''$\\\n{" SECRET "}\n", 1, "A: $ is not expanded");
    REFUSES("A=x `" SECRET "`\n", 1, "A: a backquote");
    READS("A=\"$\\\\\nHOME\"\nB=x #$HOME `\nC='x' # $HOME `\n", "A=$\\\nHOME\0B=x\0C=x\0");
}

static void a_nul_is_refused_wherever_it_stands(void) {
    static const char words[] = "a NUL byte";
    REFUSES("\0", 1, words);
    REFUSES("A=1\n\0", 2, words);
    REFUSES("A=1\n\n \0\nB=1\n", 3, words);
    REFUSES("# x\0\nA=1\n", 1, words);
    REFUSES("A=" SECRET "\0x\n", 1, "A: a NUL byte");
    REFUSES("A= " SECRET " # \0x\n", 1, "A: a NUL byte");
    REFUSES("A=1\nB='\n" SECRET "\0x'\n", 2, "B: a NUL byte");
    REFUSES("B=\"\n" SECRET "\\\0x\"\n", 1, "B: a NUL byte");
    REFUSES("B=''\\\0\n", 1, "B: a NUL byte");
    REFUSES("B='x'\r\0\n", 1, "B: a NUL byte");
    REFUSES("B='x' # x\0\n", 1, "B: a NUL byte");
    REFUSES("FOO\0\n", 1, words);
    REFUSES("FOO \0=\n", 1, words);
    REFUSES("export \0\n", 1, words);
}

static void names_of_255_bytes_are_read_and_longer_ones_refused(void) {
    for (size_t length = 254; length < 258; length++) {
        cleanup_buf struct buf text = {0}, expected = {0}, error_text = {0};
        for (size_t i = 0; i < length; i++)
            buf_append_char(&text, 'N');
        buf_append(&expected, text.data, text.len);
        buf_append(&expected, "=1", 3);
        buf_append_str(&text, "=1");
        if (length <= 255)
            reads(__LINE__, text.data, text.len, expected.data, expected.len);
        else
            refuses(__LINE__, text.data, text.len, 1, "bad name before =");
        if (length > 255)
            continue;
        /* Every text leaves room for a name. */
        text.data[length + 1] = '`';
        refuses(__LINE__, text.data, text.len, 1, "NNN...: a backquote");
        text.data[length + 1] = ' ';
        buf_append_str(&text, SECRET);
        refuses(__LINE__, text.data, text.len, 1, "NNN...: no blanks around =");
        text.data[length + 1] = '\'';
        buf_append_str(&text, "' x");
        refuses(__LINE__, text.data, text.len, 1, "NNN...: text after the closing quote");
        text.len -= 3;
        struct dotenv_error error;
        CHECK(parse(text.data, text.len, &error_text, &error) == -ERR_INVALID && error.incomplete);
        CHECK(strlen(error.text) < sizeof error.text - 1);
    }
}

static void a_text_that_can_go_on_says_so(void) {
    ENDS_IN_VALUE("A='");
    ENDS_IN_VALUE("A=\"" SECRET);
    ENDS_IN_VALUE("A=1\nB='x\ny\n" SECRET "\n");
    ENDS_IN_VALUE("A=\"" SECRET "\\");
    ENDS_IN_VALUE("A='it'\\");
    ENDS_IN_VALUE("A='it's'" SECRET);
    ENDS_IN_NAME("e");
    ENDS_IN_NAME("A='1'\nHOM");
    ENDS_IN_NAME("export");
    ENDS_IN_NAME("export ");
    ENDS_IN_NAME("export \tHOM");

    /* Cut anywhere, a text that was written by us is a text that was read so far or can go on. */
    static const char text[] = "A='it'\\''s\n\n'\nexport B_1='\"'\nC=''\n";
    for (size_t length = 0; length < sizeof text; length++) {
        cleanup_buf struct buf got = {0};
        struct dotenv_error error = {0};
        int status = parse(text, length, &got, &error);
        CHECK_SAID(!status || error.incomplete || error.in_name, "<%.*s>: %s", (int)length, text,
                   error.text);
    }
    struct dotenv_error error = {0};
    cleanup_buf struct buf got = {0};
    CHECK(parse(S("A=1\nB='x\ny\n"), &got, &error) == -ERR_INVALID && error.line == 2);
    CHECK(!strncmp(error.text, S("B: a single quote is not closed")));
    CHECK(parse(S("A=1\nB=\"x\ny\n"), &got, &error) == -ERR_INVALID && error.line == 2);
    CHECK(!strncmp(error.text, S("B: a double quote is not closed")));
}

static int stop(void *arg, const struct env_var *var) {
    gather(arg, var);
    return var->name[0] == 'B' ? -ERR_NO_ROOM : 0;
}

static void the_callback_can_end_it(void) {
    cleanup_buf struct buf got = {0};
    struct dotenv_error error = {.line = 77};
    CHECK(dotenv_parse(S("A=1\nB=2\nC=3\n="), stop, &got, &error) == -ERR_NO_ROOM);
    CHECK(check_same(got.data, got.len, S("A=1\0B=2\0")) && error.line == 77);
    CHECK(dotenv_parse(NULL, 0, stop, &got, &error) == 0 && error.line == 77);
}

/* Any bytes but NUL, of the kinds that shells stumble over. */
static void value_make(struct buf *value) {
    static const char special[] = "'\"\\$`\n\r !#~{},;&|<>()*?[]=:%a\t\x80\x83\xa0\xff";
    static const char *const pieces[] = {"\nEVIL=1\n", "'", "\\\n", "$(exit 3)", "\r\n", "\n\n"};
    unsigned kind = below(8), length = below(60);
    for (unsigned i = 0; kind == 0 && i < 255; i++)
        buf_append_char(value, (char)(i + 1));
    for (unsigned i = 0; kind > 0 && kind < 3 && i < length; i++)
        buf_append_char(value, (char)(1 + below(255)));
    for (unsigned i = 0; kind >= 3 && kind < 6 && i < length; i++)
        buf_append_char(value, special[below(sizeof special - 1)]);
    for (unsigned i = 0; kind == 6 && i < length / 6; i++)
        buf_append_str(value, pieces[below(sizeof pieces / sizeof *pieces)]);
    for (unsigned i = 0; below(3) == 0 && i < below(4); i++)
        buf_append_char(value, '\n');
    buf_append(value, "", 0);
}

static void what_is_written_is_read_and_sourced_alike(void) {
    for (unsigned long round = 0; round < rounds; round++) {
        struct buf values[RANDOM_VARS] = {0};
        struct env_var vars[RANDOM_VARS];
        static const char names[RANDOM_VARS][4] = {"V_0", "V_1", "V_2", "V_3",
                                                   "V_4", "V_5", "V_6", "V_7"};
        cleanup_buf struct buf text = {0}, expected = {0};
        for (unsigned i = 0; i < RANDOM_VARS; i++) {
            value_make(&values[i]);
            while (!i && !(round % 10) && values[i].len < 100 * 1024)
                buf_append_str(&values[i], "0123456789 '\"\\\n\r");
            vars[i] = (struct env_var){names[i], 3, values[i].data, values[i].len};
            add(&expected, names[i], 3, values[i].data, values[i].len);
        }
        dotenv_format(&text, vars, RANDOM_VARS);
        reads(__LINE__, text.data, text.len, expected.data, expected.len);
        shells_have("what was written", &text, &expected);
        for (unsigned i = 0; i < RANDOM_VARS; i++)
            buf_free(&values[i]);
    }
}

/* A quoted value as people write it, within what dotenv and sh have in common. No bare {a,b}: bash
 * expands it behind `export`. */
static void word_make(struct buf *text) {
    static const char *const in_double[] = {
        "a b", "\\\"",  "\\$", "\\`",  "\\\\", "\\x", "\\\n", "\n", "'",  "$ ",    "#",
        "~",   "{a,b}", "*",   "\xff", "\\'",  ";",   "&",    "\t", "\r", "\\\r\n"};
    static const char *const bare[] = {"a",     "/usr/bin", "a=b",  "#",    "{}",
                                       "*?[a]", "\\\n",     "-",    "+@%^", "\xc3\xa4",
                                       "\\ ",   "\\'",      "\\\"", "\\\\", "\\;"};
    bool first = true;
    for (unsigned pieces = 1 + below(5); pieces; pieces--, first = false) {
        unsigned kind = below(first ? 2 : 3);
        if (kind == 2) {
            buf_append_str(text, bare[below(sizeof bare / sizeof *bare)]);
            continue;
        }
        buf_append_char(text, kind ? '"' : '\'');
        for (unsigned i = below(6); i && kind; i--)
            buf_append_str(text, in_double[below(sizeof in_double / sizeof *in_double)]);
        for (unsigned i = below(20), c; i && !kind; i--)
            buf_append_char(text, (c = 1 + below(255)) == '\'' ? '\n' : (char)c);
        buf_append_char(text, kind ? '"' : '\'');
    }
    static const char *const ends[] = {"\n", " \n", "\t# a 'comment\n", " #\n"};
    buf_append_str(text, ends[below(4)]);
}

static void quoted_values_are_what_shells_make_of_them(void) {
    for (unsigned long round = 0; round < rounds; round++) {
        cleanup_buf struct buf text = {0}, got = {0};
        struct dotenv_error error = {0};
        for (unsigned i = 0; i < RANDOM_VARS; i++) {
            buf_printf(&text, "%sV_%u=", below(2) ? "export " : "", i);
            word_make(&text);
        }
        int status = parse(text.data, text.len, &got, &error);
        CHECK_SAID(!status, "<%s> is refused: %u: %s", text.data, error.line, error.text);
        shells_have("what was quoted", &text, &got);
    }
}

int main(int argc, char **argv) {
    if (getrandom(&seed, sizeof seed, 0) != sizeof seed || mkstemp(path) < 0)
        return 1;
    if (argc > 1)
        rounds = strtoul(argv[1], NULL, 10);
    if (argc > 2)
        seed = strtoul(argv[2], NULL, 10);
    printf("seed %lu\n", seed);
    fflush(stdout);
    a_written_text_looks_as_documented();
    a_bare_value_is_the_rest_of_the_line();
    a_quoted_value_is_a_word_of_sh();
    lines_around_statements_are_as_in_dotenv_files();
    bad_lines_are_refused_with_their_number();
    expansions_are_refused();
    a_nul_is_refused_wherever_it_stands();
    names_of_255_bytes_are_read_and_longer_ones_refused();
    a_text_that_can_go_on_says_so();
    the_callback_can_end_it();
    what_is_written_is_read_and_sourced_alike();
    quoted_values_are_what_shells_make_of_them();
    unlink(path);
    return check_end();
}
