/*
Rewrites a .cu file for the CPU device: cu2cpp [--fibers] [--list] FILE.cu > FILE.cpp

    kernel<<<grid, block, shared, stream>>>(args)
        (::cpu::configure(grid, block, shared, stream), kernel(args))
    __global__ void kernel(params) { BODY }
        the same function, which runs the grid of a lambda { BODY } that gets threadIdx, blockIdx,
        blockDim and gridDim as parameters
    __shared__ float tile[32][33];
        a reference to storage in the arena of the block
    extern __shared__ float buffer[];
        a pointer to the dynamic part of that arena
    a __device__ function that mentions threadIdx
        declares it as a local
    #include "other.cu"
        that file, rewritten, in place

Everything else stays as it is, every line keeps its number, and #line names the .cu file: so
compiler errors and the debugger point there. It reads tokens (comments, strings and preprocessor
lines are told apart from code), but does not parse C++.

A kernel is FREE when its threads can be a plain loop: neither it nor any __device__ function that
it mentions waits for other threads, uses warp or cooperative group operations, shared memory, or (a
__device__ function) the indices.
--fibers takes no kernel for free (the sanitizers need a fiber for each thread); --list prints which
kernel is what, and why.
*/
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

using std::string;

struct Options {
    bool fibers = false, list = false;
};

// ----------------------------------------------------------------------------
// Tokens

enum Kind {
    SPACE,     // blanks and comments
    DIRECTIVE, // a preprocessor line; of a #define only the head, its body follows as tokens
    TEXT,      // string or character literal
    NAME,
    NUMBER,
    SYMBOL     // one character
};
struct Token {
    Kind kind;
    string text;
    size_t offset;
    int line;
    int define;           // which #define the token is the body of, 0 for code
    string before, after; // what the rewrite adds
    bool removed;         // and what it takes away (its newlines stay)
    bool in_function;     // in the body of a __global__ or __device__ function
};

struct Source {
    string path, text;
    std::vector<Token> tokens;
    std::vector<string> define_names; // of define 1, 2, ...
};

[[noreturn]] static void fail(const string& path, int line, const string& message) {
    fprintf(stderr, "%s:%d: error: %s\n", path.c_str(), line, message.c_str());
    exit(EXIT_FAILURE);
}

static bool is_name_char(char c) { return isalnum((unsigned char)c) || c == '_'; }

// the end of a literal that begins at i (with its prefix, if it has one), or i when there is none
static size_t skip_literal(const string& s, size_t i) {
    size_t p = i;
    while (p < s.size() && p - i < 3 && strchr("LuU8R", s[p]) != NULL) { p++; }
    if (p >= s.size() || (s[p] != '"' && s[p] != '\'')) { return i; }
    if (p > i && s[p-1] == 'R' && s[p] == '"') { // raw: R"tag( ... )tag"
        const size_t open = s.find('(', p);
        if (open == string::npos) { return s.size(); }
        const string end = ")" + s.substr(p + 1, open - p - 1) + "\"";
        const size_t close = s.find(end, open);
        return close == string::npos ? s.size() : close + end.size();
    }
    const char quote = s[p++];
    while (p < s.size() && s[p] != quote && s[p] != '\n') { p += s[p] == '\\' ? 2 : 1; }
    return std::min(p + 1, s.size());
}

// the end of blanks, continued lines and comments that begin at i
static size_t skip_space(const string& s, size_t i, bool in_directive) {
    while (i < s.size()) {
        if (s.compare(i, 2, "//") == 0) {
            while (i < s.size() && s[i] != '\n') { i += s[i] == '\\' && i + 1 < s.size() ? 2 : 1; }
        } else if (s.compare(i, 2, "/*") == 0) {
            const size_t end = s.find("*/", i + 2);
            i = end == string::npos ? s.size() : end + 2;
        } else if (s[i] == '\\' && i + 1 < s.size() && (s[i+1] == '\n' || s[i+1] == '\r')) {
            i += s[i+1] == '\r' ? 3 : 2;
        } else if (isspace((unsigned char)s[i]) && !(in_directive && s[i] == '\n')) {
            i++;
        } else {
            break;
        }
    }
    return i;
}

// the end of a preprocessor line: the first newline that neither a backslash nor a comment
// continues
static size_t skip_directive(const string& s, size_t i) {
    while (i < s.size() && s[i] != '\n') {
        const size_t literal = skip_literal(s, i), space = skip_space(s, i, true);
        i = std::max(std::max(literal, space), literal == i && space == i ? i + 1 : i);
    }
    return i;
}

static size_t skip_name(const string& s, size_t i) {
    while (i < s.size() && is_name_char(s[i])) { i++; }
    return i;
}

static void tokenize(Source& source) {
    const string& s = source.text;
    int line = 1, define = 0;
    size_t define_end = 0;
    bool line_start = true; // only blanks so far on this line
    for (size_t i = 0; i < s.size();) {
        if (define != 0 && i >= define_end) { define = 0; }
        Kind kind = SYMBOL;
        size_t end = i + 1;
        const size_t space = skip_space(s, i, define != 0), literal = skip_literal(s, i);
        if (space > i) {
            kind = SPACE;
            end = space;
        } else if (s[i] == '\n') { // the end of a #define
            kind = SPACE;
        } else if (s[i] == '#' && line_start && define == 0) {
            kind = DIRECTIVE;
            end = skip_directive(s, i);
            size_t p = skip_space(s, i + 1, true);
            if (s.compare(p, 6, "define") == 0) { // the body of a macro is code
                p = skip_space(s, p + 6, true);
                const size_t name = p;
                p = skip_name(s, p);
                source.define_names.push_back(s.substr(name, p - name));
                if (p < end && s[p] == '(') { p = s.find(')', p) + 1; }
                define = (int)source.define_names.size();
                define_end = end;
                end = p;
            }
        } else if (literal > i) {
            kind = TEXT;
            end = literal;
        } else if (isdigit((unsigned char)s[i]) ||
                   (s[i] == '.' && i + 1 < s.size() && isdigit((unsigned char)s[i + 1]))) {
            kind = NUMBER; // with digit separators, exponents and suffixes
            while (end < s.size() &&
                   (is_name_char(s[end]) || s[end] == '.' ||
                    (s[end] == '\'' && is_name_char(s[end + 1])) ||
                    ((s[end] == '+' || s[end] == '-') && strchr("eEpP", s[end - 1]) != NULL &&
                     !(s[i] == '0' && (s[i + 1] == 'x' || s[i + 1] == 'X') &&
                       strchr("eE", s[end - 1]) != NULL)))) {
                end++;
            }
        } else if (is_name_char(s[i])) {
            kind = NAME;
            end = skip_name(s, i);
        }
        const string text = s.substr(i, end - i);
        source.tokens.push_back(
            Token{kind, text, i, line, kind == DIRECTIVE ? 0 : define, "", "", false, false});
        const bool newline = text.find('\n') != string::npos;
        line += (int)std::count(text.begin(), text.end(), '\n');
        line_start = kind == SPACE ? line_start || newline : false;
        i = end;
    }
}

// ----------------------------------------------------------------------------
// Code: the tokens without blanks and comments, either of the file or of one #define. Preprocessor
// lines stay in it, so that both branches of an #if can be walked through

typedef std::vector<Token*> Code;

static Code code_of(Source& source, int define) {
    Code code;
    for (Token& t : source.tokens) {
        if (t.kind != SPACE && t.define == define) { code.push_back(&t); }
    }
    return code;
}

static bool is(const Code& code, size_t i, const char* text) {
    return i < code.size() && code[i]->text == text;
}
static bool is_name(const Code& code, size_t i) { return i < code.size() && code[i]->kind == NAME; }
static bool starts(const Token& t, const char* directive) {
    size_t p = skip_space(t.text, 1, true);
    return t.kind == DIRECTIVE && t.text.compare(p, strlen(directive), directive) == 0;
}

// the position of the bracket that closes the one at `open`; code.size() when there is none. Of the
// branches of an #if the nesting is the same
static size_t matching(const Code& code, size_t open) {
    const string opening = code[open]->text;
    const string closing = opening == "(" ? ")" : opening == "[" ? "]" : "}";
    std::vector<int> at_if;
    int depth = 0;
    for (size_t i = open; i < code.size(); i++) {
        if (starts(*code[i], "if")) { at_if.push_back(depth); }
        if (starts(*code[i], "el") && !at_if.empty()) { depth = at_if.back(); }
        if (starts(*code[i], "endif") && !at_if.empty()) { at_if.pop_back(); }
        if (code[i]->kind != SYMBOL) { continue; }
        if (code[i]->text == opening) { depth++; }
        if (code[i]->text == closing && --depth == 0) { return i; }
    }
    return code.size();
}

// the same, backwards, for ) ] and >
static size_t matching_back(const Code& code, size_t close) {
    const string closing = code[close]->text;
    const string opening = closing == ")" ? "(" : closing == "]" ? "[" : "<";
    int depth = 0;
    for (size_t i = close + 1; i-- > 0;) {
        if (code[i]->kind != SYMBOL) { continue; }
        if (i < close && closing == ">" && (code[i]->text == ")" || code[i]->text == "]")) {
            i = matching_back(code, i);
        } else if (code[i]->text == closing) {
            depth++;
        } else if (code[i]->text == opening && --depth == 0) {
            return i;
        }
    }
    return 0;
}

static string join(const Code& code, size_t begin, size_t end) {
    string text;
    for (size_t i = begin; i < end; i++) {
        // as in >>
        const bool adjacent =
            i > begin && code[i - 1]->offset + code[i - 1]->text.size() == code[i]->offset;
        text += (i > begin && !adjacent ? " " : "") + code[i]->text;
    }
    return text;
}

// The positions between begin and end where a list has its commas, and end itself
static std::vector<size_t> split(const Code& code, size_t begin, size_t end, bool angles) {
    std::vector<size_t> ends;
    int depth = 0, angle = 0;
    for (size_t i = begin; i < end; i++) {
        if (code[i]->kind != SYMBOL) { continue; }
        const char c = code[i]->text[0];
        if (c == '(' || c == '[' || c == '{') { depth++; }
        if (c == ')' || c == ']' || c == '}') { depth--; }
        if (angles && depth == 0 && c == '<') { angle++; }
        if (angles && depth == 0 && c == '>') { angle--; }
        if (c == ',' && depth == 0 && angle == 0) { ends.push_back(i); }
    }
    ends.push_back(end);
    return ends;
}

// ----------------------------------------------------------------------------
// Launches

static bool three(const Code& code, size_t i, const char* c) {
    return is(code, i, c) && is(code, i + 1, c) && is(code, i + 2, c);
}

static void rewrite_launches(const Source& source, const Code& code) {
    for (size_t i = 1; i + 2 < code.size(); i++) {
        if (!three(code, i, "<")) { continue; }
        size_t end = i + 3; // of the configuration: >>> outside of all parentheses
        while (end < code.size() && !three(code, end, ">")) {
            end = is(code, end, "(") || is(code, end, "[") || is(code, end, "{")
                      ? matching(code, end) + 1
                      : end + 1;
        }
        if (end >= code.size()) {
            fail(source.path, code[i]->line, "a launch <<< without its >>>");
        }
        // the kernel: a name, perhaps qualified and with template arguments, or any postfix
        // expression
        size_t kernel = i - 1;
        for (;;) {
            while (kernel > 0 &&
                   (is(code, kernel, ">") || is(code, kernel, "]") || is(code, kernel, ")"))) {
                kernel = matching_back(code, kernel);
                if (kernel > 0 && (is_name(code, kernel - 1) || is(code, kernel - 1, "]") ||
                                   is(code, kernel - 1, ")"))) {
                    kernel--;
                }
            }
            if (kernel >= 1 && is(code, kernel - 1, "template")) { kernel--; }
            if (kernel >= 2 && is(code, kernel - 1, ":") && is(code, kernel - 2, ":")) {
                if (kernel < 3 || !(is_name(code, kernel - 3) || is(code, kernel - 3, ">"))) {
                    kernel -= 2;
                    break;
                }
                kernel -= 3;
            } else if (kernel >= 2 && is(code, kernel - 1, ".")) {
                kernel -= 2;
            } else if (kernel >= 3 && is(code, kernel - 1, ">") && is(code, kernel - 2, "-")) {
                kernel -= 3;
            } else {
                break;
            }
        }
        const string configure = "::cpu::configure(" + join(code, i + 3, end) + "), ";
        for (size_t k = i; k < end + 3; k++) { code[k]->removed = true; }
        if (is(code, end + 3, "(")) {
            code[kernel]->before += "(" + configure;
            code[matching(code, end + 3)]->after += ")";
        } else { // a macro may leave the arguments to whoever uses it
            code[kernel]->before += configure;
        }
        i = end + 2;
    }
}

// ----------------------------------------------------------------------------
// Shared variables

static const std::set<string> alignment_words = {"__align__", "alignas"};

static void rewrite_shared(const Source& source, const Code& code) {
    for (size_t i = 0; i < code.size(); i++) {
        if (!is(code, i, "__shared__")) { continue; }
        if (code[i]->define == 0 && !code[i]->in_function) {
            fail(source.path, code[i]->line,
                 "__shared__ outside of a function; declare it inside of the kernel");
        }
        const bool is_extern = (i > 0 && is(code, i - 1, "extern")) || is(code, i + 1, "extern");
        const size_t begin =
            i > 0 && (is(code, i - 1, "extern") || is(code, i - 1, "static")) ? i - 1 : i;
        size_t p = i + 1;
        string alignment;
        Code type; // of the declaration, without its declarators
        size_t end = p;
        while (end < code.size() && !is(code, end, ";")) {
            end = is(code, end, "(") || is(code, end, "[") || is(code, end, "{")
                      ? matching(code, end) + 1
                      : end + 1;
        }
        if (end >= code.size() && code[i]->define == 0) {
            fail(source.path, code[i]->line, "a __shared__ declaration without its ;");
        }
        end = std::min(end, code.size());
        Code words; // the declaration without alignment and storage class
        while (p < end) {
            if (is_name(code, p) && alignment_words.count(code[p]->text) != 0 &&
                is(code, p + 1, "(")) {
                const size_t close = matching(code, p + 1);
                alignment = join(code, p + 2, close);
                p = close + 1;
            } else {
                if (!is(code, p, "extern") && !is(code, p, "static")) { words.push_back(code[p]); }
                p++;
            }
        }
        string replacement, base;
        size_t first = 0;
        for (size_t last : split(words, 0, words.size(), true)) {
            size_t dims = first; // the declarator is: type, *, name, dimensions
            int angle = 0;
            while (dims < last && !(is(words, dims, "[") && angle == 0)) {
                angle += is(words, dims, "<") ? 1 : is(words, dims, ">") ? -1 : 0;
                dims++;
            }
            if (dims == first || !is_name(words, dims - 1)) {
                fail(
                    source.path, code[i]->line,
                    "cannot read this __shared__ declaration; write `__shared__ type name[size];`");
            }
            const string name = words[dims-1]->text;
            string type_text = join(words, first, dims - 1);
            if (base.empty()) {
                base = type_text.substr(0, type_text.find('*'));
            } else {
                type_text = base + " " + type_text;
            }
            if (is_extern) {
                replacement += type_text + "* const " + name + " = (" + type_text +
                               "*)::cpu::dynamic_shared(); ";
            } else {
                // the address of a static tells two variables apart, in every instance of a
                // template
                replacement += "static char cpu_site_" + name + "; auto& " + name +
                               " = ::cpu::shared_variable<" + type_text + join(words, dims, last) +
                               ">(&cpu_site_" + name + (alignment.empty() ? "" : ", " + alignment) +
                               "); ";
            }
            first = last + 1;
        }
        code[begin]->before += replacement;
        for (size_t k = begin; k <= std::min(end, code.size() - 1); k++) {
            code[k]->removed = true;
        }
        i = end;
    }
}

// ----------------------------------------------------------------------------
// Functions and macros, and what they mention

struct Function {
    string name;
    bool kernel;
    int line;
    const Source* source;
    Token *open, *close; // the braces of its body
    // of its guard: the parentheses after `if`; NULL when it has none
    Token *condition, *condition_end;
    bool returns;        // the guard is `if (condition) { return; }`
    string guard;        // the body of a lambda that says whether a thread is inside
    std::vector<string> parameters;
    bool takes_reference; // that is not const
    std::set<string> mentions, assigned;
    std::vector<Token*> short_loops; // the `for` of loops of constant length
    string because; // why its threads need fibers; empty: they do not
};

static const std::set<string> indices = {"threadIdx", "blockIdx", "blockDim", "gridDim"};
static const std::set<string> fiber_words = {
    "__shared__", "__syncthreads", "__syncthreads_count", "__syncthreads_or", "__syncthreads_and",
    "__syncwarp", "__activemask", "cooperative_groups", "this_thread_block", "tiled_partition",
    "thread_block", "thread_block_tile", "this_grid", "coalesced_threads", "wmma", "nvcuda"};
static const std::set<string> attribute_words = {"__launch_bounds__", "__align__", "alignas",
                                                 "__attribute__",     "decltype",  "noexcept"};

static bool needs_fibers(const string& word) {
    const bool warp_operation = word.size() > 7 && word.compare(0, 2, "__") == 0 &&
                                word.compare(word.size() - 5, 5, "_sync") == 0;
    return warp_operation || fiber_words.count(word) != 0;
}

// The name of a parameter, empty when it has none: the last name, if a type can stand before it
static string parameter_name(const Code& code, size_t begin, size_t end) {
    size_t last = begin, words = 0;
    for (size_t i = begin; i < end && !is(code, i, "=") && !is(code, i, "["); i++) {
        if (is(code, i, "const") || is(code, i, "volatile") || is(code, i, "__restrict__") ||
            is(code, i, "__grid_constant__")) {
            continue;
        }
        words++;
        last = i;
    }
    static const std::set<string> types = {"void", "bool",  "char",   "short",    "int",
                                           "long", "float", "double", "unsigned", "signed"};
    const bool named = words >= 2 && is_name(code, last) && types.count(code[last]->text) == 0 &&
                       !is(code, last - 1, ":");
    return named ? code[last]->text : "";
}

// Is the parameter changed, or could it be? Then each thread needs its own copy
static bool is_assigned(const Code& code, size_t i) {
    const size_t size = code.size();
    // of what a pointer points to
    const bool element = is(code, i + 1, "[") || (is(code, i + 1, "-") && is(code, i + 2, ">"));
    if (!element && i > 0 && is(code, i - 1, "&") &&
        !(i > 1 && (is_name(code, i - 2) || is(code, i - 2, ")") || is(code, i - 2, "]")))) {
        return true;
    }
    if (i > 1 && ((is(code, i - 1, "+") && is(code, i - 2, "+")) ||
                  (is(code, i - 1, "-") && is(code, i - 2, "-")))) {
        return true;
    }
    size_t p = i + 1; // past .member and .member[index]
    for (;;) {
        if (is(code, p, ".") && p + 1 < size) { p += 2; }
        else if (is(code, p, "[") && p > i + 1) { p = matching(code, p) + 1; }
        else { break; }
    }
    if (p + 1 >= size) { return false; }
    const string a = code[p]->text, b = code[p+1]->text;
    if (a == "=" && b != "=") { return true; }
    if ((a == "+" || a == "-") && (b == a || b == "=")) { return true; }
    if (a.size() == 1 && strchr("*/%&|^", a[0]) != NULL && b == "=") { return true; }
    return (a == "<" || a == ">") && b == a && is(code, p + 2, "=");
}

// Does the expression between begin and end grow evenly with threadIdx.x? Then it is made of names,
// numbers, casts, sums and products, and mentions threadIdx.x, or a variable that does, once at
// most. -1: it does not
typedef std::map<string, std::set<string>> Macros; // the names that the body of each macro mentions
static int mentions_thread(const Code& code, size_t begin, size_t end,
                           const std::set<string>& dependent, const Macros& macros) {
    int mentions = 0;
    bool divides = false;
    for (size_t i = begin; i < end; i++) {
        if (code[i]->kind == NAME) {
            const auto macro = macros.find(code[i]->text);
            const bool constant = macro == macros.end() || macro->second.empty();
            // a call, or who knows what
            if (is(code, i + 1, "(") || is(code, i + 1, "[") || !constant) { return -1; }
            const bool member = i > begin && is(code, i - 1, ".");
            mentions += !member && (dependent.count(code[i]->text) != 0 ||
                                    (is(code, i, "threadIdx") && is(code, i + 2, "x")));
        } else if (code[i]->kind == SYMBOL) {
            if (strchr("+-*/%().", code[i]->text[0]) == NULL) { return -1; }
            // ++ and --
            const bool doubled =
                (is(code, i, "+") || is(code, i, "-")) && is(code, i + 1, code[i]->text.c_str());
            if (doubled) { return -1; }
            divides = divides || is(code, i, "/") || is(code, i, "%");
        } else if (code[i]->kind != NUMBER) {
            return -1;
        }
    }
    return mentions > 1 || (mentions == 1 && divides) ? -1 : mentions;
}

// Finds the guard of a kernel: `if (a < b) { ... }` around all of its work, or `if (a >= b) {
// return; }` before it, after nothing but declarations. One of the sides grows evenly with
// threadIdx.x
static void find_guard(const Code& code, size_t open, size_t close, const Macros& macros,
                       Function* f) {
    std::set<string> dependent;
    string text;
    size_t p = open + 1;
    while (!is(code, p, "if")) { // type name = expression;
        size_t equals = p, end;
        while (equals < close && (code[equals]->kind == NAME || is(code, equals, ":"))) {
            equals++;
        }
        if (!is(code, equals, "=") || equals < p + 2 || !is_name(code, equals - 1)) { return; }
        for (end = equals + 1; end < close && !is(code, end, ";"); end++) {}
        const int mentions = mentions_thread(code, equals + 1, end, dependent, macros);
        if (mentions < 0) { return; }
        const string name = code[equals-1]->text;
        if (mentions == 1) { dependent.insert(name); }
        text += join(code, p, end + 1) + " (void)" + name + "; ";
        p = end + 1;
    }
    if (!is(code, p + 1, "(")) { return; }
    const size_t end = matching(code, p + 1);
    size_t comparison = p + 2;
    while (comparison < end && !is(code, comparison, "<") && !is(code, comparison, ">")) {
        comparison++;
    }
    const size_t right = comparison + (is(code, comparison + 1, "=") ? 2 : 1);
    const int left_mentions = mentions_thread(code, p + 2, comparison, dependent, macros);
    const int right_mentions = mentions_thread(code, right, end, dependent, macros);
    if (comparison == end || left_mentions < 0 || right_mentions < 0 ||
        left_mentions + right_mentions > 1) {
        return;
    }
    size_t q = end + 1;
    f->returns = is(code, q, "return") || (is(code, q, "{") && is(code, q + 1, "return") &&
                                           is(code, q + 2, ";") && is(code, q + 3, "}"));
    if (!f->returns && !(is(code, q, "{") && matching(code, q) + 1 == close)) { return; }
    f->condition = code[p+1];
    f->condition_end = code[end];
    f->guard = text + "return " + (f->returns ? "!" : "") + "(" + join(code, p + 2, end) + ");";
}

// finds `for (int j = 0; j < V; j++)`, where V is a parameter of the template or a small number
static void find_short_loops(const Code& code, size_t open, size_t close,
                             const std::set<string>& constants, Function* f) {
    for (size_t i = open; i < close; i++) {
        if (!is(code, i, "for") || !is(code, i + 1, "(")) { continue; }
        size_t semicolon = i + 2;
        while (semicolon < close && !is(code, semicolon, ";")) { semicolon++; }
        const bool counts = is_name(code, semicolon + 1) && is(code, semicolon + 2, "<") &&
                            is(code, semicolon + 4, ";");
        if (!counts) { continue; }
        const Token& bound = *code[semicolon+3];
        const bool small = bound.kind == NUMBER && atoi(bound.text.c_str()) <= 16;
        if (small || constants.count(bound.text) != 0) { f->short_loops.push_back(code[i]); }
    }
}

// the names between the < > of the template that the function at position i is
static std::set<string> template_parameters(const Code& code, size_t i) {
    std::set<string> names;
    size_t p = i;
    while (p > 0 && !is(code, p - 1, ";") && !is(code, p - 1, "}") && !is(code, p - 1, "{") &&
           code[p - 1]->kind != DIRECTIVE) {
        p--;
    }
    if (!is(code, p, "template")) { return names; }
    for (; p < i; p++) {
        if (is_name(code, p) &&
            (is(code, p + 1, ",") || is(code, p + 1, ">") || is(code, p + 1, "="))) {
            names.insert(code[p]->text);
        }
    }
    return names;
}

// the function that is declared after __global__ or __device__ at position i; false when it is a
// variable or has no body
static bool read_function(const Source& source, const Code& code, size_t i, const Macros& macros,
                          Function* f) {
    size_t p = i + 1;
    bool is_operator = false;
    for (; p < code.size(); p++) {
        if (code[p]->kind == DIRECTIVE) { continue; }
        if (is_name(code, p) && attribute_words.count(code[p]->text) != 0 && is(code, p + 1, "(")) {
            p = matching(code, p + 1);
        } else if (is(code, p, "operator")) {
            is_operator = true;
            if (is(code, p + 1, "(") && is(code, p + 2, ")")) { p += 2; }
        } else if (is(code, p, "(")) {
            break;
        } else if (is(code, p, ";") || is(code, p, "{") || (is(code, p, "=") && !is_operator)) {
            return false;
        }
    }
    if (p >= code.size()) { return false; }
    size_t name = p - 1;
    if (!is_operator && is(code, name, ">")) { name = matching_back(code, name) - 1; }
    const size_t close = matching(code, p);
    size_t body = close + 1;
    bool initializers = false; // of a constructor: member(value) or member{value}
    for (; body < code.size() && !is(code, body, ";"); body++) {
        if (is(code, body, ":") && !is(code, body + 1, ":") && !is(code, body - 1, ":")) {
            initializers = true;
        }
        if (is(code, body, "(")) { body = matching(code, body); continue; }
        if (is(code, body, "{")) {
            if (!initializers || !is_name(code, body - 1)) { break; }
            body = matching(code, body);
        }
        if (is(code, body, "=")) { return false; } // = default, = delete
    }
    if (!is(code, body, "{")) { return false; }
    const size_t end = matching(code, body);
    if (end >= code.size()) { fail(source.path, code[body]->line, "this { has no }"); }
    *f = Function{is_operator ? "operator" : code[name]->text,
                  is(code, i, "__global__"),
                  code[i]->line,
                  &source,
                  code[body],
                  code[end],
                  NULL,
                  NULL,
                  false,
                  "",
                  {},
                  false,
                  {},
                  {},
                  {},
                  ""};
    size_t begin = p + 1;
    for (size_t comma : split(code, p + 1, close, true)) {
        bool reference = false, constant = false;
        for (size_t k = begin; k < comma; k++) {
            reference = reference || is(code, k, "&");
            constant = constant || is(code, k, "const");
        }
        f->takes_reference = f->takes_reference || (reference && !constant);
        const string parameter = parameter_name(code, begin, comma);
        if (!parameter.empty()) {
            const bool pack = is(code, comma - 2, ".");
            f->parameters.push_back(parameter + (pack ? "..." : ""));
        }
        begin = comma + 1;
    }
    for (size_t k = body; k < end; k++) {
        code[k]->in_function = true;
        if (!is_name(code, k)) { continue; }
        f->mentions.insert(code[k]->text);
        if (is_assigned(code, k)) { f->assigned.insert(code[k]->text); }
    }
    if (f->kernel) { find_guard(code, body, end, macros, f); }
    find_short_loops(code, body, end, template_parameters(code, i), f);
    return true;
}

// adds what the macros mention that a set of words mentions
static void expand_macros(std::set<string>* words, const Macros& macros) {
    std::vector<string> work(words->begin(), words->end());
    while (!work.empty()) {
        const auto macro = macros.find(work.back());
        work.pop_back();
        if (macro == macros.end()) { continue; }
        for (const string& word : macro->second) {
            if (words->insert(word).second) { work.push_back(word); }
        }
    }
}

// A parameter that a kernel hands to a function by reference is changed, too
static void find_references(std::vector<Function>& functions) {
    std::set<string> takers;
    for (const Function& f : functions) {
        if (f.takes_reference) { takers.insert(f.name); }
    }
    for (Function& f : functions) {
        bool calls = false;
        for (const string& word : f.mentions) { calls = calls || takers.count(word) != 0; }
        if (calls) { f.assigned.insert(f.parameters.begin(), f.parameters.end()); }
    }
}

// which functions need fibers: those that say so, then those that mention one of them, until
// nothing changes
static void classify(std::vector<Function>& functions) {
    std::map<string, string> because; // by name of a __device__ function
    for (bool changed = true; changed;) {
        changed = false;
        for (Function& f : functions) {
            if (!f.because.empty()) { continue; }
            for (const string& word : f.mentions) {
                if (needs_fibers(word) || (!f.kernel && indices.count(word) != 0)) {
                    f.because = word;
                }
                const auto callee = because.find(word);
                if (callee != because.end() && word != f.name) {
                    f.because = callee->second + " in " + word;
                }
                if (!f.because.empty()) { break; }
            }
            if (f.because.empty()) { continue; }
            changed = true;
            if (!f.kernel) {
                if (f.name == "operator") {
                    fail(f.source->path, f.line,
                         "an operator that uses " + f.because +
                             " hides it from its callers; make it a function");
                }
                because[f.name] = f.because;
            }
        }
    }
}

static string list_of(const std::vector<string>& names) {
    string list;
    for (const string& name : names) { list += ", " + name; }
    return list;
}

static void rewrite_function(Function& f, const Options& options) {
    // unrolled early, they are no obstacle to vectorising the loop over threads; where there is
    // none, they are vectorised themselves
    for (Token* loop : f.short_loops) { loop->before += f.because.empty() ? "CPU_UNROLL " : ""; }
    if (!f.kernel) {
        string locals;
        const char* names[4][2] = {{"threadIdx", "uint3 threadIdx = ::cpu::current_thread_index"},
                                   {"blockIdx", "uint3 blockIdx = ::cpu::current_block_index"},
                                   {"blockDim", "dim3 blockDim = ::cpu::current_block_dim"},
                                   {"gridDim", "dim3 gridDim = ::cpu::current_grid_dim"}};
        for (const auto& name : names) {
            if (f.mentions.count(name[0]) != 0) {
                locals += string(" [[maybe_unused]] const ") + name[1] + "();";
            }
        }
        f.open->after = locals + f.open->after;
        return;
    }
    bool copies = false;
    for (const string& parameter : f.parameters) {
        copies = copies || f.assigned.count(parameter) != 0 ||
                 f.assigned.count(parameter.substr(0, parameter.find('.'))) != 0;
    }
    string names = list_of(f.parameters);
    names = names.empty() ? names : names.substr(2);
    const bool free = f.because.empty() && !options.fibers;
    string run = "::cpu::run_fibers(\"" + f.name + "\", [=](CPU_INDICES)";
    if (free) {
        const string guard =
            f.condition != NULL ? "[=](CPU_INDICES) { " + f.guard + " }" : "CPU_NO_GUARD";
        run = "::cpu::run_free(\"" + f.name + "\", " + guard + ", [=](CPU_FREE_INDICES)";
        if (f.condition != NULL) {
            f.condition->after =
                (f.returns ? "!cpu_inside && (" : "cpu_inside || (") + f.condition->after;
            f.condition_end->before += ")";
        }
    }
    f.open->after = " ::cpu::check_arguments(\"" + f.name + "\", \"" + names + "\"" +
                    list_of(f.parameters) + "); " + run + " CPU_BODY(" + (copies ? "mutable" : "") +
                    ") {" + f.open->after;
    f.close->before += "}); ";
}

// ----------------------------------------------------------------------------
// Files

static bool read_file(const string& path, string* text) {
    FILE* file = fopen(path.c_str(), "rb");
    if (file == NULL) { return false; }
    char buffer[65536];
    size_t n;
    while ((n = fread(buffer, 1, sizeof(buffer), file)) > 0) { text->append(buffer, n); }
    fclose(file);
    return true;
}

// `#include "x.cu"` or "x.cuh": a path beside the file, or in the current directory, that can be
// read. Empty: another line
static string included_file(const Source& source, const Token& t) {
    if (!starts(t, "include")) { return ""; }
    const size_t open = t.text.find('"'), close = t.text.rfind('"');
    if (open == string::npos || close <= open) { return ""; }
    const string name = t.text.substr(open + 1, close - open - 1);
    const size_t dot = name.rfind('.');
    if (dot == string::npos || (name.substr(dot) != ".cu" && name.substr(dot) != ".cuh")) {
        return "";
    }
    const size_t slash = source.path.rfind('/');
    const string beside = slash == string::npos ? name : source.path.substr(0, slash + 1) + name;
    string text;
    if (read_file(beside, &text)) { return beside; }
    if (read_file(name, &text)) { return name; }
    fail(source.path, t.line,
         "cannot read \"" + name + "\", neither beside this file nor in the current directory");
}

// The file and all that it includes, each once in the list; `files` keeps their order of first
// mention
static void load(const string& path, std::vector<Source*>* files) {
    for (const Source* file : *files) {
        if (file->path == path) { return; }
    }
    Source* source = new Source;
    source->path = path;
    if (!read_file(path, &source->text)) {
        fprintf(stderr, "cu2cpp: cannot read %s; give the path of a .cu file\n", path.c_str());
        exit(EXIT_FAILURE);
    }
    tokenize(*source);
    files->push_back(source);
    for (const Token& t : source->tokens) {
        const string included = included_file(*source, t);
        if (!included.empty()) { load(included, files); }
    }
}

static void write(const Source& source, const std::vector<Source*>& files, int depth) {
    if (depth > 20) { fail(source.path, 1, "#include \"...\" goes in circles"); }
    printf("#line 1 \"%s\"\n", source.path.c_str());
    for (const Token& t : source.tokens) {
        const string included = included_file(source, t);
        if (!included.empty()) {
            for (const Source* file : files) {
                if (file->path == included) { write(*file, files, depth + 1); }
            }
            printf("\n#line %d \"%s\"\n", t.line, source.path.c_str());
            continue;
        }
        if (starts(t, "pragma") && t.text.find("unroll") != string::npos) {
            fputs("CPU_UNROLL", stdout);
            continue;
        }
        fputs(t.before.c_str(), stdout);
        if (!t.removed) { fputs(t.text.c_str(), stdout); }
        fputs(t.after.c_str(), stdout);
    }
}

int main(int argc, char** argv) {
    Options options;
    const char* path = NULL;
    bool valid = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--fibers") == 0) { options.fibers = true; }
        else if (strcmp(argv[i], "--list") == 0) { options.list = true; }
        else if (argv[i][0] != '-' && path == NULL) { path = argv[i]; }
        else { valid = false; }
    }
    if (path == NULL || !valid) {
        fprintf(stderr, "usage: cu2cpp [--fibers] [--list] FILE.cu > FILE.cpp\n");
        return EXIT_FAILURE;
    }
    std::vector<Source*> files;
    load(path, &files);
    Macros macros;
    for (Source* source : files) {
        for (int define = 1; define <= (int)source->define_names.size(); define++) {
            std::set<string>& words = macros[source->define_names[define-1]];
            for (const Token* t : code_of(*source, define)) {
                if (t->kind == NAME) { words.insert(t->text); }
                if (t->text == "__global__") {
                    fail(source->path, t->line,
                         "a kernel inside of a #define cannot be rewritten; write it out, or use a "
                         "template");
                }
            }
        }
    }
    std::vector<Function> functions;
    for (Source* source : files) {
        const Code code = code_of(*source, 0);
        for (size_t i = 0; i < code.size(); i++) {
            const bool first =
                i == 0 || !(is(code, i - 1, "__device__") || is(code, i - 1, "__global__"));
            Function f;
            if (first && (is(code, i, "__global__") || is(code, i, "__device__")) &&
                read_function(*source, code, i, macros, &f)) {
                functions.push_back(f);
            }
        }
        for (int define = 0; define <= (int)source->define_names.size(); define++) {
            rewrite_launches(*source, code_of(*source, define));
            rewrite_shared(*source, code_of(*source, define));
        }
    }
    find_references(functions);
    for (Function& f : functions) { expand_macros(&f.mentions, macros); }
    classify(functions);
    if (options.list) {
        for (const Function& f : functions) {
            const char* what = !f.because.empty()    ? "fibers: "
                               : f.condition != NULL ? "free, with a guard"
                                                     : "free";
            if (f.kernel) { printf("%-40s %s%s\n", f.name.c_str(), what, f.because.c_str()); }
        }
        return EXIT_SUCCESS;
    }
    for (Function& f : functions) { rewrite_function(f, options); }
    write(*files[0], files, 0);
    return EXIT_SUCCESS;
}
