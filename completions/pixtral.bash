# Tab completion of pixtral for bash, written by `pixtral completions bash`.
# Put this in ~/.bashrc:  source <(pixtral completions bash)

# The line up to the cursor, word by word and without quoting, into `words`. `open` is the quote that is still open;
# `kept` counts the letters of the last word that bash leaves alone: those up to the last of its word breaks (= : @).
_pixtral_split() {
    local line=${COMP_LINE:0:COMP_POINT} char word= begun= i
    words=() open= kept=0
    for ((i = 0; i < ${#line}; i++)); do
        char=${line:i:1}
        if [[ $char == \\ && $open != \' ]]; then
            ((++i))
            word+=${line:i:1} begun=1
        elif [[ -n $open ]]; then
            if [[ $char == "$open" ]]; then open=; else word+=$char; fi
        elif [[ $char == [\'\"] ]]; then
            open=$char begun=1
        elif [[ $char == [[:space:]] ]]; then
            [[ -n $begun ]] && words+=("$word")
            word= begun= kept=0
        else
            word+=$char begun=1
            [[ $COMP_WORDBREAKS != *"$char"* ]] || kept=${#word}
            [[ $char != @ ]] || ((kept > 0 && kept--))  # which goes with what follows
        fi
    done
    words+=("$word")
}

# Offers those of the words that begin as the word at the cursor does.
_pixtral_offer() {
    local word
    for word; do
        [[ $word == "$current"* ]] || continue
        word=$before$word
        word=${word:kept}
        [[ -n $open ]] || printf -v word %q "$word"
        COMPREPLY+=("$word")
    done
}

# Offers what only the program knows: models, devices.
_pixtral_ask() {
    local answers
    mapfile -t answers < <("${program/#~\//$HOME/}" completions "$1" 2>/dev/null)
    _pixtral_offer "${answers[@]}"
}

# Offers folders, and files with one of the endings; all files where no ending is given, or nothing fits. The ending /
# is no file's: folders only.
_pixtral_files() {
    local path ending here=() fitting=() typed=$current
    [[ $typed == '~/'* ]] && typed=$HOME/${typed:2}
    while IFS= read -r -d '' path; do
        [[ -n $path ]] || continue
        here+=("$path")
        [[ -d $path || $# == 0 ]] && fitting+=("$path")
        for ending; do
            [[ ! -d $path && ${path,,} == *."$ending" ]] && fitting+=("$path")
        done
    done < <(shopt -u failglob; shopt -s nullglob; printf '%s\0' "$typed"*)
    ((${#fitting[@]})) || [[ $1 == / ]] || fitting=("${here[@]}")
    ((${#fitting[@]})) && compopt -o filenames 2>/dev/null
    for path in "${fitting[@]}"; do
        path=$before$path
        COMPREPLY+=("${path:kept}")
    done
}

_pixtral() {
    local program=$1 words open kept current before= path=pixtral commands flags valued flag= ended= place=0 word
    COMPREPLY=()
    _pixtral_split
    current=${words[${#words[@]} - 1]}
    _pixtral_command
    for word in "${words[@]:1:${#words[@]}-2}"; do
        if [[ -n $flag ]]; then
            flag=
        elif [[ $word == -- ]]; then
            ended=1
        elif [[ -z $ended && $word == -?* ]]; then
            [[ " $valued " == *" $word "* ]] && flag=$word
        elif [[ " $commands " == *" $word "* ]]; then
            path+=" $word"
            _pixtral_command
        else
            ((++place))
        fi
    done
    if [[ -z $flag && -z $ended && $current == --*=* ]]; then
        flag=${current%%=*} before=$flag= current=${current#*=}
    fi
    if [[ -n $flag ]]; then
        _pixtral_value "$path $flag"
    elif [[ -z $ended && $current == -* ]]; then
        _pixtral_offer $flags
    else
        _pixtral_offer $commands
        _pixtral_value "$path $place"
        [[ -z $current && -z $ended && ${#COMPREPLY[@]} == 0 ]] && _pixtral_offer $flags
    fi
}

_pixtral_command() {
    case $path in
    pixtral)
        commands='run serve tokenize download inspect export verify bench completions cache'
        flags='--version --install-completion --show-completion -h --help'
        valued=''
        ;;
    'pixtral run')
        commands=''
        flags='-p --prompt -i --image --system --messages --raw --reasoning-effort --model-path --image-preprocessing --trust-remote-code --weights-format --force-download --max-new-tokens --top-k --temperature --top-p --min-p --repetition-penalty --seed --stop --ignore-eos --json --quiet --no-reasoning --stats --logprobs --devices --max-length --max-batch-size --max-ce-batch-size --kv-cache-dtype --speculative --save-to-serialized-model-path --serialized-model-path --weight-path --quantization-encoding --quantize-vision --double-quantization -h --help'
        valued='-p --prompt -i --image --system --messages --reasoning-effort --model-path --image-preprocessing --weights-format --max-new-tokens --top-k --temperature --top-p --min-p --repetition-penalty --seed --stop --devices --max-length --max-batch-size --max-ce-batch-size --kv-cache-dtype --speculative --save-to-serialized-model-path --serialized-model-path --weight-path --quantization-encoding'
        ;;
    'pixtral serve')
        commands=''
        flags='--host --port --served-model-name --drain-timeout --quiet --model-path --image-preprocessing --trust-remote-code --weights-format --force-download --max-new-tokens --top-k --temperature --top-p --min-p --repetition-penalty --reasoning-effort --api-key --insecure --allow-media-domain --allow-private-media --media-path --max-queue --max-images --max-body-mib --max-batch-size --kv-cache-memory --image-cache-memory --weight-path --quantization-encoding --quantize-vision --double-quantization --devices --max-length --max-ce-batch-size --kv-cache-dtype --speculative --save-to-serialized-model-path --serialized-model-path -h --help'
        valued='--host --port --served-model-name --drain-timeout --model-path --image-preprocessing --weights-format --max-new-tokens --top-k --temperature --top-p --min-p --repetition-penalty --reasoning-effort --api-key --allow-media-domain --allow-private-media --media-path --max-queue --max-images --max-body-mib --max-batch-size --kv-cache-memory --image-cache-memory --weight-path --quantization-encoding --devices --max-length --max-ce-batch-size --kv-cache-dtype --speculative --save-to-serialized-model-path --serialized-model-path'
        ;;
    'pixtral tokenize')
        commands=''
        flags='-p --prompt -i --image --system --messages --raw --reasoning-effort --model-path --image-preprocessing --trust-remote-code --weights-format --force-download --json --quiet -h --help'
        valued='-p --prompt -i --image --system --messages --reasoning-effort --model-path --image-preprocessing --weights-format'
        ;;
    'pixtral download')
        commands=''
        flags='--weights-format --force-download --json --quiet -h --help'
        valued=--weights-format
        ;;
    'pixtral inspect')
        commands=''
        flags='--weights-format --kv-cache-dtype --json --quiet -h --help'
        valued='--weights-format --kv-cache-dtype'
        ;;
    'pixtral export')
        commands=''
        flags='--weight-path --quantization-encoding --quantize-vision --double-quantization --weights-format --force-download --json --quiet -h --help'
        valued='--weight-path --quantization-encoding --weights-format'
        ;;
    'pixtral verify')
        commands=''
        flags='--json --quiet -h --help'
        valued=''
        ;;
    'pixtral bench')
        commands=''
        flags='--model-path --shape --quantization-encoding --prompt-tokens --new-tokens --batch-sizes --image --repeats --devices --compare --json -h --help'
        valued='--model-path --shape --quantization-encoding --prompt-tokens --new-tokens --batch-sizes --image --repeats --devices --json'
        ;;
    'pixtral completions')
        commands=''
        flags='-h --help'
        valued=''
        ;;
    'pixtral cache')
        commands='list path verify remove prune'
        flags='-h --help'
        valued=''
        ;;
    'pixtral cache list')
        commands=''
        flags='--json --quiet -h --help'
        valued=''
        ;;
    'pixtral cache path')
        commands=''
        flags='--json --quiet -h --help'
        valued=''
        ;;
    'pixtral cache verify')
        commands=''
        flags='--json --quiet -h --help'
        valued=''
        ;;
    'pixtral cache remove')
        commands=''
        flags='-y --yes --json --quiet -h --help'
        valued=''
        ;;
    'pixtral cache prune')
        commands=''
        flags='--older-than -y --yes --json --quiet -h --help'
        valued=--older-than
        ;;
    esac
}

_pixtral_value() {
    case $1 in
    'pixtral run -i' |\
        'pixtral run --image' |\
        'pixtral tokenize -i' |\
        'pixtral tokenize --image')
        _pixtral_files png jpg jpeg webp gif bmp tif tiff
        ;;
    'pixtral run --messages' |\
        'pixtral tokenize --messages')
        _pixtral_files json
        ;;
    'pixtral run --reasoning-effort' |\
        'pixtral serve --reasoning-effort' |\
        'pixtral tokenize --reasoning-effort')
        _pixtral_offer none high
        ;;
    'pixtral run --model-path' |\
        'pixtral serve --model-path' |\
        'pixtral tokenize --model-path' |\
        'pixtral download 0' |\
        'pixtral export 0' |\
        'pixtral bench --model-path')
        _pixtral_ask models
        _pixtral_files gguf
        ;;
    'pixtral run --image-preprocessing' |\
        'pixtral serve --image-preprocessing' |\
        'pixtral tokenize --image-preprocessing')
        _pixtral_offer hf native
        ;;
    'pixtral run --weights-format' |\
        'pixtral serve --weights-format' |\
        'pixtral tokenize --weights-format' |\
        'pixtral download --weights-format' |\
        'pixtral inspect --weights-format' |\
        'pixtral export --weights-format')
        _pixtral_offer hf native gguf
        ;;
    'pixtral run --devices' |\
        'pixtral serve --devices' |\
        'pixtral bench --devices')
        _pixtral_ask devices
        ;;
    'pixtral run --kv-cache-dtype' |\
        'pixtral serve --kv-cache-dtype' |\
        'pixtral inspect --kv-cache-dtype')
        _pixtral_offer auto fp8
        ;;
    'pixtral run --speculative' |\
        'pixtral serve --speculative')
        _pixtral_offer auto off
        ;;
    'pixtral run --save-to-serialized-model-path' |\
        'pixtral serve --save-to-serialized-model-path' |\
        'pixtral export 1' |\
        'pixtral bench --json')
        _pixtral_files
        ;;
    'pixtral run --serialized-model-path' |\
        'pixtral serve --serialized-model-path' |\
        'pixtral verify 0')
        _pixtral_ask serialized
        _pixtral_files
        ;;
    'pixtral run --weight-path' |\
        'pixtral serve --weight-path' |\
        'pixtral export --weight-path')
        _pixtral_files safetensors gguf
        ;;
    'pixtral run --quantization-encoding' |\
        'pixtral serve --quantization-encoding' |\
        'pixtral export --quantization-encoding')
        _pixtral_offer float32 bfloat16 fp8 q6_k q4_0 q4_k nf4
        ;;
    'pixtral serve --media-path')
        _pixtral_files /
        ;;
    'pixtral inspect 0')
        _pixtral_ask all-models
        _pixtral_files
        ;;
    'pixtral bench --shape')
        _pixtral_offer 1b 3b 8b nemo-12b ministral-3b small-24b
        ;;
    'pixtral bench --quantization-encoding')
        _pixtral_offer float32 bfloat16 fp8 q8_0 q6_k q5_k q4_k q4_0 nf4
        ;;
    'pixtral completions 0')
        _pixtral_offer bash zsh fish
        ;;
    'pixtral cache verify '* |\
        'pixtral cache remove '*)
        _pixtral_ask cached
        ;;
    esac
}

complete -F _pixtral pixtral
