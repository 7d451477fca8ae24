"""Short words to render, English and Chinese: few enough letters to be legible on a small picture."""

from __future__ import annotations

import numpy as np

ENGLISH = (  # noqa: SIM905 - words in a row are easier to keep than a list
    "air apple art autumn bank bed bell bike bird blue boat book bread bus cake camp cat city class clay cloud club coast code "
    "coffee cold cook corn day deep desk dog door dream drum dry east echo exit farm fast film fire fish flag fly food fox free "
    "fresh fun game garden gate gift glass gold good green hall hand hat hello hill home honey hot house ice ink inn island jam "
    "jazz juice jump keep key kid king kite lab lake lamp land leaf left lemon light lime line live loud love lunch map market "
    "math mild milk mint moon movie music new news nice night north note ocean office one open orange paint paper park path peace "
    "pear pen photo piano pink plan plum pool post quiet radio rain red rest rice right river road rock room rose run safe sale "
    "salt sand school sea shop show silk sky slow snow soap song soup south spring star stay stone stop storm sugar summer sun "
    "sweet tea team ten time tour town train travel tree two up velvet view wait walk warm water wave west wide wind winter wood "
    "word world yes zero zoo"
).split()

CHINESE = (  # noqa: SIM905
    "你好 谢谢 早安 晚安 北京 上海 春天 夏天 秋天 冬天 咖啡 茶馆 书店 学校 公园 大海 高山 河流 月亮 太阳 星空 花园 森林 小雨 "
    "白雪 清风 明月 红色 蓝天 绿地 黄金 牛奶 面包 水果 苹果 米饭 音乐 电影 画展 旅行 火车 地铁 出口 入口 欢迎 开门 关门 "
    "停车 安全 注意 新年 快乐 幸福 平安 健康 朋友 家人 老师 学生 时间 今天 明天 未来 梦想 光明 希望 和平 自由 东西 南北 "
    "上下 左右 一二 三四 五六 七八 十月 中国 世界 城市 乡村 大学 图书 设计 科学 数学 历史 艺术"
).split()


def phrase(language: str, generator: np.random.Generator, *, num_words: int) -> list[str]:
    """Words in one way of writing; now and then a number among English ones."""
    words = CHINESE if language == "zh" else ENGLISH
    chosen = [words[index] for index in generator.integers(len(words), size=num_words)]
    if language == "zh":
        return chosen
    if generator.random() < 0.15:
        chosen[-1] = str(generator.integers(1, 1000))
    style = (str.upper, str.lower, str.title)[generator.integers(3)]
    return [style(word) for word in chosen]


def join(words: list[str], language: str) -> str:
    """The words as written text: Chinese sets no spaces."""
    return ("" if language == "zh" else " ").join(words)
